"""benchmarks.inference: the work that is timed has the detections of the evaluation."""

from pathlib import Path

from support.inference import small_detector

from benchmarks.inference import Timed
from pipeline.config import dump
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.evaluation.detections import concatenate
from pipeline.inference.evaluate import BuildDetection, evaluate_here, open_evaluator


def test_timed_work_has_the_detections_of_the_evaluation_and_a_sample_of_most_items(tmp_path: Path) -> None:
    build_shards(*write_synthetic(tmp_path / "drawn", images=5, seed=4), tmp_path / "val")
    config, inference = small_detector(tmp_path / "val")
    evaluator = open_evaluator(config, inference, "cpu")
    expected = evaluate_here(evaluator, inference, config)
    build = BuildDetection(dump(config), inference.model.state_dict(), evaluator.loader.index.digest)
    groups, samples = zip(*Timed(build)()(range(5)), strict=True)
    found = evaluator.score([i for ids, _ in groups for i in ids], concatenate(part for _, part in groups))
    assert found.metrics == expected.metrics
    assert found.detections.to_results() == expected.detections.to_results()
    assert [sample is not None for sample in samples] == [False, False, True, True, True]
    assert all(alone > 0 and whole > 0 for alone, whole in samples[2:])
