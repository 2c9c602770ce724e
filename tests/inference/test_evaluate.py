"""What an actor of an evaluation builds: the model and the data of the driver, or an error."""

from pathlib import Path

import pytest
from support.inference import small_detector

from pipeline.config import dump
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.errors import ConfigError, ShardError
from pipeline.evaluation.detections import concatenate
from pipeline.inference.evaluate import BuildDetection, evaluate_here, open_evaluator


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val")
    build_shards(*write_synthetic(folder / "drawn", images=5, seed=4), folder / "val")
    return folder / "val"


def test_build_detection_makes_the_detections_of_the_evaluation(shards: Path, tmp_path: Path) -> None:
    config, inference = small_detector(shards)
    evaluator = open_evaluator(config, inference, "cpu")
    expected = evaluate_here(evaluator, inference, config)
    detect = BuildDetection(dump(config), inference.model.state_dict(), evaluator.loader.index.digest)()
    parts = [*detect(range(3, 5)), *detect(range(0, 3))]
    found = evaluator.score([i for ids, _ in parts for i in ids], concatenate(part for _, part in parts))
    digests = {result.detections.to_results_json(tmp_path / "results.json") for result in (expected, found)}
    assert len(digests) == 1
    assert found.metrics == expected.metrics


def test_build_detection_other_data_on_a_node_raises(shards: Path) -> None:
    config, inference = small_detector(shards)
    with pytest.raises(ShardError, match=r"/val "):
        BuildDetection(dump(config), inference.model.state_dict(), "0" * 64)()


def test_open_evaluator_other_categories_raises(shards: Path) -> None:
    config, inference = small_detector(shards)
    other = type(inference)(config, inference.categories[1:], inference.model, inference.state)
    with pytest.raises(ConfigError, match=r"data\.val"):
        open_evaluator(config, other, "cpu")
