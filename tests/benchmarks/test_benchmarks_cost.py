"""benchmarks/cost.py: hours follow from the pass, epochs and work; the price only multiplies."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import cost
from jobs.cli import main
from jobs.table import CONFIGS
from pipeline.presets.rows import find_presets, select


def run(*argv: str) -> int:
    return main(cost.build_parser(), cost.run, list(argv))


def test_one_gpu_takes_epochs_times_images_times_the_pass() -> None:
    (row,) = cost.rows_of(select(find_presets(CONFIGS), ["r50_deformable"]), 0.025, [1], 200)
    assert row["hours"][1] == pytest.approx(50 * 118_287 / 2 * 0.025 / 3600)
    assert row["work"] == 1


def test_more_gpus_take_less_time_and_no_less_money(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("r50_deformable", "r50_detr_dc5", "--pass-ms", "25", "--gpu-hour", "2", "--gpus", "1", "8") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| r50")]
    assert len(lines) == 2
    for line in lines:
        alone, eight = (float(number) for number in line.split("|")[4].split("/"))
        one, many = (float(number) for number in line.split("|")[5].split("/"))
        assert alone / 8 < eight < alone / 6
        assert one == pytest.approx(2 * alone, rel=0.03)
        assert many >= one


def test_measured_pass_comes_out_of_a_result_of_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"steps": [{"ms": 40.0}, {"ms": 20.0}]}), encoding="utf-8")
    assert run("r50_deformable", "--measured", str(path), "--gpu-hour", "1", "--gpus", "1") == 0
    assert "takes 20.0 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--pass-ms", "0", "--gpu-hour", "1"], "--pass-ms"),
        (["--pass-ms", "25", "--gpu-hour", "-1"], "--gpu-hour"),
        (["--measured", "nowhere.json", "--gpu-hour", "1"], "nowhere.json"),
        (["r60", "--pass-ms", "25", "--gpu-hour", "1"], "r60"),
    ],
)
def test_wrong_input_is_refused(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert re.search(re.escape(said), capsys.readouterr().err)
