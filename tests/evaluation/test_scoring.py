"""A checkpoint scored beside the training has the AP of one scored inline, and leaves the checkpoint as it was."""

import json
from pathlib import Path

import mlflow
import pytest
import torch
from support.helpers import tiny_config

from pipeline import checkpoint
from pipeline.checkpoint import TrainState
from pipeline.config import Config, dump
from pipeline.data.index import load_index
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import CATEGORIES, write_synthetic
from pipeline.engine.ema import WeightAverage
from pipeline.evaluation.evaluator import build_evaluator
from pipeline.evaluation.inline import InlineEvaluation
from pipeline.evaluation.scoring import score
from pipeline.model import build_model
from pipeline.model.weights.files import file_digest
from pipeline.runs.evaluations import Evaluation, read_evaluations, results_file, write_evaluations
from pipeline.runtime import single
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.run import start_run

EARLIER = {"epoch": 0.0, "step": 5.0, "AP": 0.1, "AP50": 0.2, "AP_small": 0.0}
NAME = "checkpoint_7"


class Scene:
    """A run with a checkpoint after step 7 of epoch 1, whose average differs from its weights."""

    def __init__(self, folder: Path) -> None:
        annotations, images = write_synthetic(folder / "raw", images=8, seed=0, size=96)
        build_shards(annotations, images, folder / "shards")
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
        self.before = self.files()

    def files(self) -> dict[str, str]:
        """The digest of each file of the checkpoint."""
        return {path.name: file_digest(path) for path in (self.folder / NAME).iterdir()}

    def metrics(self, key: str) -> dict[int, float]:
        history = mlflow.MlflowClient(self.config.tracking.uri).get_metric_history(self.run_id or "", key)
        assert len({metric.step for metric in history}) == len(history)
        return {metric.step: metric.value for metric in history}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scoring"))


@pytest.fixture(scope="module")
def scored(scene: Scene) -> dict[str, float]:
    write_evaluations(str(scene.folder), [Evaluation("checkpoint_5", EARLIER)])
    return score(dump(scene.config), str(scene.folder), scene.run_id, NAME)


def inline(scene: Scene) -> dict[str, float] | None:
    parts = scene.config
    evaluator = build_evaluator(parts.data, parts.evaluation, single())
    with RunLogger(parts.tracking.uri, None) as no_logger:
        return InlineEvaluation(evaluator, no_logger, str(scene.folder / "inline")).run(scene.model, scene.state, ())


def test_score_of_the_average_is_bit_equal_to_inline(scene: Scene, scored: dict[str, float]) -> None:
    assert scored == inline(scene)
    assert (scored["epoch"], scored["step"]) == (1, 7)


def test_score_changes_no_bit_of_the_checkpoint_and_no_row(scene: Scene, scored: dict[str, float]) -> None:
    assert scene.files() == scene.before
    assert read_evaluations(str(scene.folder)) == [Evaluation("checkpoint_5", EARLIER)]  # the supervisor adds one


def test_score_is_logged_at_the_step_of_the_weights(scene: Scene, scored: dict[str, float]) -> None:
    assert scene.metrics("val/AP") == {7: scored["AP"]}
    client = mlflow.MlflowClient(scene.config.tracking.uri)
    listed = {info.path for info in client.list_artifacts(scene.run_id or "", "results")}
    assert listed == {"results/epoch_001.json", "results/epoch_001_categories.json"}
    table = json.loads(
        Path(client.download_artifacts(scene.run_id or "", "results/epoch_001_categories.json")).read_text()
    )
    assert [row["id"] for row in table] == sorted(CATEGORIES)
    assert {row["id"]: row["name"] for row in table} == CATEGORIES


def test_score_and_inline_keep_the_same_results_file(scene: Scene, scored: dict[str, float]) -> None:
    assert scored == inline(scene)
    kept = [Path(results_file(str(folder), 7)) for folder in (scene.folder, scene.folder / "inline")]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    logged = mlflow.MlflowClient(scene.config.tracking.uri).download_artifacts(scene.run_id, "results/epoch_001.json")
    assert kept[0].read_bytes() == Path(logged).read_bytes()


def test_inline_without_room_for_the_results_file_warns(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    (scene.folder / "full").mkdir(exist_ok=True)
    (scene.folder / "full" / "results").write_text("a file where the folder should be")
    evaluator = build_evaluator(scene.config.data, scene.config.evaluation, single())
    with RunLogger(scene.config.tracking.uri, None) as no_logger, caplog.at_level("WARNING"):
        entry = InlineEvaluation(evaluator, no_logger, str(scene.folder / "full")).run(scene.model, scene.state, ())
    assert entry is not None
    assert "results" in caplog.text


def test_inline_with_a_plot_that_fails_warns(
    scene: Scene, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no plot")

    monkeypatch.setattr("pipeline.evaluation.inline.precision_recall_plot", fail)
    entry = inline(scene)
    monkeypatch.undo()
    assert entry is not None
    assert entry == inline(scene)
    assert "no plot" in caplog.text


def test_score_twice_logs_once(scene: Scene, scored: dict[str, float]) -> None:
    """After a node that died, or a driver that did."""
    assert score(dump(scene.config), str(scene.folder), scene.run_id, NAME) == scored
    assert scene.metrics("val/AP") == {7: scored["AP"]}
