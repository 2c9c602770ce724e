"""benchmarks/serving.py starts a server, loads it and prints a row per number of clients."""

import json
from pathlib import Path

import pytest

from benchmarks.serving import build_parser, draw_files, run, write_checkpoint
from jobs.cli import main
from pipeline.checkpoint import load_inference
from pipeline.inference.predictor import read_image


def test_benchmark_draws_images_and_a_checkpoint_that_loads(tmp_path: Path) -> None:
    images = [read_image(file) for file in draw_files((64, 48))]
    assert {image.size for image in images} == {(64, 48)}
    assert len({image.tobytes() for image in images}) == len(images)
    inference = load_inference(write_checkpoint(tmp_path, "demo", ["model.num_classes=3"]))
    assert [category.name for category in inference.categories] == ["class 1", "class 2", "class 3"]


@pytest.mark.slow
def test_benchmark_prints_a_row_for_each_number_of_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--clients", "1", "2", "--seconds", "2", "--json", str(tmp_path / "s.json")]
    assert main(build_parser(), run, arguments) == 0
    rows = json.loads((tmp_path / "s.json").read_text())
    assert [row["clients"] for row in rows] == [1, 2]
    assert capsys.readouterr().out.count("| 1 |") == 1
    for row in rows:
        assert row["images_per_s"] > 0
        assert row["p50_ms"] <= row["p99_ms"]
        assert row["replica_cpu_ms"] > row["alone_cpu_ms"] * 0.5
