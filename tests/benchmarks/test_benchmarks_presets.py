"""benchmarks/presets.py at a size that takes no time: what it measures, and its table where a preset fails."""

import json
from pathlib import Path

import pytest

from benchmarks import presets
from benchmarks.model import random_batch
from jobs.cli import main
from jobs.table import CONFIGS
from pipeline.config import override
from pipeline.presets.rows import find_presets


def test_both_steps_are_measured() -> None:
    config = override(find_presets(CONFIGS)["demo"], ["model.op=torch"])
    found = presets.measure(config, random_batch(1, 64, 96, config.model.num_classes), steps=1)
    assert found.keys() == {f"{part}_{what}" for part in presets.PARTS for what in ("seconds", "mib")}
    assert found["train_seconds"] > found["eval_seconds"] > 0
    assert found["train_mib"] >= found["eval_mib"] >= 0


def test_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def measured(preset: str, argv: list[str]) -> dict[str, float] | None:
        asked.append((preset, argv))
        times = {"train_seconds": 4.0, "train_mib": 1000.0, "eval_seconds": 2.0, "eval_mib": 500.0}
        if preset == "r50_detr":
            return None
        return times if preset == presets.BASE else {key: value / 2 for key, value in times.items()}

    monkeypatch.setattr(presets, "in_process", measured)
    path = tmp_path / "results.json"
    arguments = ["demo", "r50_detr", "--size", "64x96", "--threads", "1", "--json", str(path)]
    assert main(presets.build_parser(), presets.run, arguments) == 0
    assert [preset for preset, _ in asked] == ["r50_deformable", "r50_detr", "demo"]  # what ratios are to comes first
    assert asked[0][1][:2] == ["--size", "64x96"]
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0][0] == "preset"
    assert rows[2][:2] == ["r50_detr", "no result (out of memory?)"]
    assert rows[3] == ["demo", "2.00", "0.50", "500", "0.50", "1.00", "0.50", "250", "0.50"]
    assert {len(row) for row in (rows[0], rows[1], rows[3])} == {9}
    assert json.loads(path.read_text())["results"][1] == {"preset": "r50_detr", "failed": True}


@pytest.mark.parametrize(("arguments", "said"), [(["--size", "big"], "such as 256x320"), (["nothing"], "no preset")])
def test_bad_input(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(presets.build_parser(), presets.run, arguments) == 2
    assert said in capsys.readouterr().err
