"""A checkpoint scored beside the training has the AP of one scored inline, and says so where it is looked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from helpers import tiny_config

from pipeline import checkpoint
from pipeline.checkpoint import TrainState
from pipeline.config import Config, dump
from pipeline.data.index import load_index
from pipeline.data.shards import build_shards
from pipeline.data.synthetic import CATEGORIES, write_synthetic
from pipeline.ema import WeightAverage
from pipeline.evaluation.evaluator import build_evaluator
from pipeline.model import build_model
from pipeline.run_logger import RunLogger
from pipeline.runtime import single
from pipeline.tracking import start_run
from pipeline.training.evaluating import InlineEvaluation
from pipeline.training.evaluations import Evaluation, add_evaluation, read_evaluations
from pipeline.training.scoring import score

EARLIER = {"epoch": 0.0, "step": 5.0, "AP": 0.1, "AP50": 0.2, "AP_small": 0.0}
NAME = "checkpoint_7"


class Scene:
    """A run with a checkpoint after step 7 of epoch 1, whose average differs from its weights."""

    def __init__(self, folder: Path) -> None:
        annotations, pictures = write_synthetic(folder / "raw", images=8, seed=0, size=96)
        build_shards(annotations, pictures, folder / "shards")
        data = {"val": str(folder / "shards"), "augment": {"eval_size": 96, "max_size": 128}}
        self.config: Config = tiny_config(data=data, tracking={"uri": f"sqlite:///{folder}/mlflow.db"})
        self.run_id = start_run(self.config.tracking, self.config, "run")
        self.folder = folder / "run"
        torch.manual_seed(0)
        model = build_model(self.config.model)
        average = WeightAverage(model, 0.5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        average.update(model, 10)
        categories = load_index(str(folder / "shards")).categories
        self.model = average.model
        self.state = TrainState(dump(self.config), categories, "digest", 2, 0, 7, 7)
        checkpoint.save(self.folder / NAME, self.state, model.state_dict(), {}, average.model.state_dict())

    def metrics(self, key: str) -> dict[int, float]:
        history = mlflow.MlflowClient(self.config.tracking.uri).get_metric_history(self.run_id or "", key)
        assert len({metric.step for metric in history}) == len(history)
        return {metric.step: metric.value for metric in history}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scoring"))


@pytest.fixture(scope="module")
def scored(scene: Scene) -> dict[str, float]:
    add_evaluation(str(scene.folder), Evaluation("checkpoint_5", EARLIER))  # it ended after step 7 was saved
    return score(dump(scene.config), str(scene.folder), scene.run_id, NAME)


def inline(scene: Scene) -> TrainState:
    parts = scene.config
    evaluator = build_evaluator(parts.data, parts.train, parts.evaluation, single())
    with RunLogger(parts.tracking.uri, None) as nobody:
        return InlineEvaluation(evaluator, nobody).run(scene.model, scene.state)


def test_the_average_is_scored_as_inline_to_the_bit(scene: Scene, scored: dict[str, float]) -> None:
    expected = inline(scene).metrics
    assert scored == {f"val/{key}": value for key, value in expected.items()}


def test_the_state_of_the_checkpoint_says_it(scene: Scene, scored: dict[str, float]) -> None:
    found = checkpoint.load(scene.folder / NAME)  # its digests are right
    assert found.state.evaluated is not None
    assert found.state.metrics["AP"] == scored["val/AP"]
    assert [(each["epoch"], each["step"]) for each in found.state.history] == [(0, 5), (1, 7)]
    unchanged = replace(found.state, metrics={}, history=())
    assert unchanged == scene.state


def test_the_file_of_the_run_has_a_row(scene: Scene, scored: dict[str, float]) -> None:
    rows = read_evaluations(str(scene.folder))
    assert [row.checkpoint for row in rows] == ["checkpoint_5", NAME]
    assert rows[-1].entry["AP"] == scored["val/AP"]


def test_mlflow_has_it_at_the_step_of_the_weights(scene: Scene, scored: dict[str, float]) -> None:
    assert scene.metrics("val/AP") == {7: scored["val/AP"]}
    client = mlflow.MlflowClient(scene.config.tracking.uri)
    listed = {info.path for info in client.list_artifacts(scene.run_id or "", "results")}
    assert listed == {"results/epoch_001.json", "results/epoch_001_categories.json"}
    table = json.loads(
        Path(client.download_artifacts(scene.run_id or "", "results/epoch_001_categories.json")).read_text()
    )
    assert [row["id"] for row in table] == sorted(CATEGORIES)
    assert {row["id"]: row["name"] for row in table} == CATEGORIES


def test_scored_again_it_is_there_once(scene: Scene, scored: dict[str, float]) -> None:
    """After a node that died, or a driver that did."""
    assert score(dump(scene.config), str(scene.folder), scene.run_id, NAME) == scored
    assert len(read_evaluations(str(scene.folder))) == 2
    assert scene.metrics("val/AP") == {7: scored["val/AP"]}
    document: dict[str, Any] = json.loads((scene.folder / NAME / "state.json").read_text())
    assert [each["step"] for each in document["history"]] == [5, 7]
