"""`benchmarks.onnx`: the table has a row per preset; both sides take turns."""

import json
from pathlib import Path

import pytest

from benchmarks import onnx
from jobs.cli import main

SMALL = ("model.enc_layers=1", "model.dec_layers=1", "model.hidden_dim=32", "model.ffn_dim=32", "model.queries=20")


def test_both_take_turns_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    times = onnx.best_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"}


@pytest.mark.slow
def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--size", "64x96", "--rounds", "1", "--threads", "1", "--json", str(tmp_path / "out.json")]
    assert main(onnx.build_parser(), onnx.run, [*command, "--set", *SMALL]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| r50_deformable | 0.")
    found = json.loads((tmp_path / "out.json").read_text())["results"]["r50_deformable"]
    assert found["agreement"] == 1.0
    assert found["ratio"] == found["onnxruntime"] / found["model"]


@pytest.mark.parametrize("argv", [["--presets", "absent"], ["--size", "64"], ["--rounds", "0"]])
def test_bad_requests(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(onnx.build_parser(), onnx.run, argv) == 2
    assert "error: " in capsys.readouterr().err
