"""The report at the end of a run: its page, its JSON and MLflow have the same numbers, and no failure ends the run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from support.browser import foreign_addresses
from support.detections import planted_detections
from support.helpers import tiny_config
from support.pages import tables_of

from pipeline.config import dump
from pipeline.data.plan import evaluated_samples
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import CATEGORIES, write_synthetic
from pipeline.evaluation.class_table import score_file
from pipeline.evaluation.coco import coco_scores, ground_truth
from pipeline.evaluation.detections import Detections, concatenate, from_results_json
from pipeline.evaluation.report import per_category_ap
from pipeline.launch.run_report import report_run
from pipeline.runs.evaluations import SUBSET, Evaluation, results_file, write_evaluations
from pipeline.runs.record import RunRecord
from pipeline.tracking.run import start_run

BEST, LAST = 4, 6  # steps


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """A finished run with two evaluations, of which the first is the best one."""
    folder = tmp_path_factory.mktemp("report")
    annotations, images = write_synthetic(folder / "raw", images=12, seed=3, size=96)
    build_shards(annotations, images, folder / "val")
    config = tiny_config(
        data={"val": str(folder / "val")}, tracking={"uri": f"sqlite:///{folder}/mlflow.db"}, storage=str(folder)
    )
    run_id = start_run(config.tracking, config, "reported")
    truth, rows = ground_truth(str(folder / "val")), []
    for epoch, (step, found) in enumerate({BEST: 0.9, LAST: 0.3}.items()):
        detections = planted_detections(truth, found=found)
        path = Path(results_file(str(folder / "run"), step))
        detections.to_results_json(path)
        metrics = coco_scores(truth, detections).metrics
        (folder / "run" / f"checkpoint_{step}").mkdir()
        rows.append(Evaluation(f"checkpoint_{step}", {"epoch": float(epoch), "step": float(step), **metrics}))
    assert rows[0].entry["AP"] > rows[1].entry["AP"]
    write_evaluations(str(folder / "run"), rows)
    return RunRecord("reported", str(folder / "run"), dump(config), run_id, status="FINISHED")


@pytest.fixture(scope="module")
def text(record: RunRecord) -> str:
    return report_run(record)


def logged(record: RunRecord, name: str) -> Path:
    uri = record.config["tracking"]["uri"]
    return Path(mlflow.MlflowClient(uri).download_artifacts(record.run_id or "", f"analysis/{name}"))


def test_report_run_page_json_and_mlflow_have_the_same_numbers(record: RunRecord, text: str) -> None:
    html = (Path(record.folder) / "analysis" / "index.html").read_text("utf-8")
    numbers = json.loads((Path(record.folder) / "analysis" / "analysis.json").read_text())
    assert logged(record, "index.html").read_text("utf-8") == html
    assert json.loads(logged(record, "analysis.json").read_text()) == numbers
    tables = tables_of(html)
    for row in tables["The 12 COCO numbers"]:
        estimate = numbers["metrics"][row["number"]]
        assert row["value"] == (None if estimate["value"] < 0 else estimate["value"])
        interval = estimate["interval"] or {"low": None, "high": None}
        assert (row["low"], row["high"]) == (interval["low"], interval["high"])
    client = mlflow.MlflowClient(record.config["tracking"]["uri"])
    classes = {row["class"]: row for row in tables["Classes, lowest AP first"]}
    assert len(classes) == len(CATEGORIES)
    for each in numbers["categories"]:
        row = classes[each["name"]]
        for key, value in {"AP": each["ap"]["value"], "F1": each["best"]["f1"]}.items():
            assert row[key] == value
        assert row["threshold"] == each["best"]["threshold"]
        for key, value in {"AP": row["AP"], "F1": row["F1"], "threshold": row["threshold"]}.items():
            (point,) = client.get_metric_history(record.run_id or "", f"val/{key}_class/{each['id']}")
            assert (point.step, point.value) == (BEST, value)
    for row in tables["Causes of errors"]:
        (cost,) = [each for each in numbers["errors"]["costs"] if each["cause"] == row["cause"]]
        assert (row["errors"], row["share"], row["AP50 cost"]) == (cost["count"], cost["share"], cost["ap_cost"])
        (kept,) = [each for each in numbers["kept_errors"]["costs"] if each["cause"] == row["cause"]]
        assert (row["kept"], row["share of kept"]) == (kept["count"], kept["share"])
    (point,) = client.get_metric_history(record.run_id or "", "val/threshold")
    assert point.value == numbers["thresholds"]["best"]["threshold"]


def test_report_run_shows_the_best_evaluation_of_pycocotools(record: RunRecord, text: str) -> None:
    truth = ground_truth(record.config["data"]["val"])
    scores = coco_scores(truth, planted_detections(truth, found=0.9), backend="pycocotools")
    numbers = json.loads((Path(record.folder) / "analysis" / "analysis.json").read_text())
    assert {name: each["value"] for name, each in numbers["metrics"].items()} == scores.metrics
    assert {each["id"]: each["ap"]["value"] for each in numbers["categories"]} == per_category_ap(scores)


def test_report_run_page_has_images_and_refers_to_nothing_outside(record: RunRecord, text: str) -> None:
    html = logged(record, "index.html").read_text("utf-8")
    assert foreign_addresses(html) == []
    numbers = json.loads(logged(record, "analysis.json").read_text())
    ids = {each["image_id"] for key in ("worst", "most_missed") for each in numbers[key]}
    assert ids
    assert html.count("data:image/jpeg;base64,") == len(ids)  # each once
    assert len(html) < 4e6
    plots = {path.stem for path in logged(record, "").glob("*.png")}
    assert {"confusion", "classes", "errors", "thresholds", "sizes", "aspect_ratios"} <= plots


def test_report_run_text_is_a_table_of_classes_worst_first(record: RunRecord, text: str) -> None:
    head, columns, *lines = text.splitlines()
    assert head.endswith(f"{record.folder}/analysis/index.html)")
    place = columns.split().index("AP")
    values = [float(line.split()[place]) for line in lines]
    assert values == sorted(values)
    assert len(values) == len(CATEGORIES)


def test_report_run_without_what_it_needs_warns(
    record: RunRecord, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = {**record.config, "data": {**record.config["data"], "val": str(tmp_path / "gone")}}
    for broken in (replace(record, folder=str(tmp_path)), replace(record, config=lost)):
        caplog.clear()
        assert report_run(broken) == ""
        assert "report" in caplog.text
    assert not list(tmp_path.iterdir())


def test_report_run_of_some_images_has_their_ap_and_says_so(record: RunRecord, tmp_path: Path) -> None:
    truth = ground_truth(record.config["data"]["val"])
    ids = sorted(image["id"] for image in truth["images"])
    kept = [ids[place] for place in evaluated_samples(len(ids), 5)]
    detections = planted_detections(truth, found=0.9)
    detections = detections[np.isin(detections.image_ids, kept)]
    detections.to_results_json(Path(results_file(str(tmp_path), BEST)))
    metrics = coco_scores(truth, detections, kept).metrics
    (tmp_path / "checkpoint_4").mkdir()
    entry = {"epoch": 0.0, "step": float(BEST), **metrics, SUBSET: 5.0}
    write_evaluations(str(tmp_path), [Evaluation("checkpoint_4", entry)])
    assert report_run(replace(record, folder=str(tmp_path), run_id=None))
    numbers = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert numbers["images"] == 5
    assert {name: each["value"] for name, each in numbers["metrics"].items()} == metrics
    assert "5 of 12 images" in (tmp_path / "analysis" / "index.html").read_text("utf-8")


def test_report_run_of_more_than_100_detections_has_the_ap_of_the_best_100(record: RunRecord, tmp_path: Path) -> None:
    truth = ground_truth(record.config["data"]["val"])
    right = planted_detections(truth, found=0.9)
    ids = np.repeat([image["id"] for image in truth["images"]], 99)
    first = Detections(
        ids,
        np.tile(np.arange(99, dtype=np.int32), len(ids) // 99),
        np.full(len(ids), truth["categories"][0]["id"]),
        np.ones((len(ids), 4)),
        np.ones(len(ids)),
    )
    both = concatenate([first, replace(right, orders=right.orders + np.int32(99))])  # one is among the best 100
    both = both[np.lexsort((both.orders, both.image_ids))]
    file = Path(results_file(str(tmp_path), BEST))
    both.to_results_json(file)
    read = from_results_json(file)
    best = coco_scores(truth, read[read.orders < 100]).metrics
    (annotations,) = (Path(record.config["data"]["val"]).parent / "raw").glob("*.json")
    assert score_file(file, annotations)[0] == coco_scores(truth, read).metrics != best, "as pycocotools, by category"
    (tmp_path / "checkpoint_4").mkdir()
    write_evaluations(str(tmp_path), [Evaluation("checkpoint_4", {"epoch": 0.0, "step": float(BEST), **best})])
    assert report_run(replace(record, folder=str(tmp_path), run_id=None))
    numbers = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert {name: each["value"] for name, each in numbers["metrics"].items()} == best


def test_report_run_without_mlflow_writes_the_page(record: RunRecord, tmp_path: Path) -> None:
    shutil.copytree(record.folder, tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))
    assert report_run(replace(record, folder=str(tmp_path / "run"), run_id=None))
    assert (tmp_path / "run" / "analysis" / "index.html").is_file()
