"""A trained model's evaluation in MLflow: in its run or version, under the split's name, with results and data set."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.helpers import tiny_checkpoint
from support.inference import small_run

from pipeline.config import from_dict
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.errors import ConfigError, ResourceError, RunError
from pipeline.evaluation.coco import METRICS
from pipeline.launch.evaluation_request import check_request
from pipeline.launch.model_evaluation import ModelEvaluation, evaluate_model
from pipeline.registry.register import register
from pipeline.runs.record import RunRecord, write_run
from pipeline.tracking.client import connect, load_mlflow
from pipeline.tracking.lineage import LOGGED_MODEL_TAG
from pipeline.tracking.run import start_run

STEP = 1  # of the weights of `small_run`


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """A run with an MLflow run, and its version `models:/seen@champion`."""
    record = small_run(tmp_path_factory.mktemp("run"))
    register(record, "seen", "champion")
    return record


@pytest.fixture(scope="module")
def test_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("test")
    build_shards(*write_synthetic(folder / "drawn", images=4, seed=2), folder / "shards")
    return str(folder / "shards")


def evaluate(model: str, *overrides: str, **options: Any) -> ModelEvaluation:
    return evaluate_model(check_request(model, overrides, **options))


def points(record: RunRecord, key: str) -> list[tuple[int, float]]:
    store = connect(record.config["tracking"]["uri"])
    return [(point.step, point.value) for point in store.get_metric_history(str(record.run_id), key)]


def test_log_of_a_run_writes_numbers_results_and_data_set(record: RunRecord, test_shards: str, tmp_path: Path) -> None:
    found = evaluate(record.folder, f"data.val={test_shards}", split="test", log=True)
    found.log()
    for key in METRICS:
        assert points(record, f"test/{key}") == [(STEP, found.result.metrics[key])]
    for row in found.classes:
        assert points(record, f"test/AP_class/{row.id}") == [(STEP, row.AP)] * (row.AP >= 0)
    client: Any = connect(record.config["tracking"]["uri"])
    inputs = client.get_run(record.run_id).inputs.dataset_inputs
    assert {each.tags[0].value: json.loads(each.dataset.source)["uri"] for each in inputs}["testing"] == test_shards
    mlflow = load_mlflow()
    source = f"{client.get_run(record.run_id).info.artifact_uri}/results"
    folder = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path)))
    results = (folder / f"test_step_{STEP}.json").read_bytes()
    assert len(json.loads(results)) == len(found.result.detections) > 0
    document = json.loads((folder / f"test_step_{STEP}_evaluation.json").read_text())
    assert document["metrics"] == found.result.metrics
    assert document["results_sha256"] == hashlib.sha256(results).hexdigest()
    assert document["settings"]["data.val"] == test_shards
    found.log()
    assert len(points(record, "test/AP")) == 1, "the same number is not written twice"


def test_log_of_a_version_also_writes_its_tags_and_page(record: RunRecord, test_shards: str) -> None:
    uri = record.config["tracking"]["uri"]
    settings = (f"data.val={test_shards}", "evaluation.flip=true")
    found = evaluate("models:/seen@champion", *settings, split="mirrored", log=True, tracking_uri=uri)
    found.log()
    client: Any = connect(uri)
    version = client.get_model_version("seen", "1")
    assert {key: float(version.tags[f"mirrored/{key}"]) for key in METRICS} == found.result.metrics
    assert version.tags["run"] == record.name, "other tags stay"
    page = {metric.key: metric.value for metric in client.get_logged_model(version.tags[LOGGED_MODEL_TAG]).metrics}
    assert page["mirrored/AP"] == found.result.metrics["AP"]
    found.log()
    assert points(record, "mirrored/AP") == [(STEP, found.result.metrics["AP"])]


def test_log_of_the_same_evaluation_completes_the_numbers_of_the_training(record: RunRecord) -> None:
    found = evaluate(record.folder, log=True)
    found.log()
    assert points(record, "val/AR100") == [(STEP, found.result.metrics["AR100"])]


def test_evaluate_without_log_writes_nothing(record: RunRecord, test_shards: str) -> None:
    evaluate(record.folder, f"data.val={test_shards}", split="unlogged").log()
    assert points(record, "unlogged/AP") == []


def test_log_without_a_run_in_mlflow_is_refused(record: RunRecord, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no MLflow run"):
        evaluate(str(tiny_checkpoint(tmp_path)), log=True)
    lonely = replace(record, folder=str(tmp_path), run_id=None)
    write_run(lonely)
    with pytest.raises(RunError, match="no MLflow run"):
        evaluate(str(tmp_path), log=True)
    config = from_dict(record.config)
    run_id = start_run(config.tracking, config, "deleted")
    client: Any = connect(config.tracking.uri)
    client.delete_run(run_id)
    write_run(replace(lonely, run_id=run_id))
    with pytest.raises(RunError, match="is deleted"):
        evaluate(str(tmp_path), log=True)
    with pytest.raises(ConfigError, match="--split"):
        evaluate(record.folder, "evaluation.flip=true", log=True)


def test_evaluate_gpu_that_does_not_exist_is_refused(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ResourceError, match=r"scaling\.use_gpu"):
        evaluate(record.folder, "scaling.use_gpu=true")


def test_evaluate_in_this_process_takes_the_threads_of_a_worker(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    evaluate(record.folder, "scaling.use_gpu=false")
    assert threads == [], "all cores"
    evaluate(record.folder, "scaling.use_gpu=false", "scaling.cpus_per_worker=3")
    assert threads == [3]
