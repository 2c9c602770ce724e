"""The benchmarks of loader and plan run to their end and say what they promise; their figures are not judged here."""

import json
from pathlib import Path

import pytest
from support.data import write_shards

from benchmarks import data, loader_step, plan
from jobs.cli import main


@pytest.mark.slow  # a dozen processes, each of which imports torch
def test_the_loader_and_its_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_shards(tmp_path, images=20).folder, tmp_path / "out.json"
    options = ["--workers", "1", "--repeat", "2", "--rounds", "1", "--turns", "2", "--json", str(out)]
    assert main(data.build_parser(), data.run, [folder, *options]) == 0
    results = json.loads(out.read_text())
    assert results["images"] == 40
    rows = results["workers_1"]
    ours = {f"{name} {mode}" for name in ("bare", "loader") for mode in ("reference", "fused")}
    assert set(rows) == ours | {"CocoDetection", "CocoDetection, uint8"}
    assert all(row["images_per_s"][0] > 0 and row["memory_mib"][0] > 10 for row in rows.values())
    assert results["padding_4"]["grouped"] < results["padding_4"]["random"]
    printed = capsys.readouterr().out
    assert printed.count("| 1 |") == 6
    assert 0 < results["chunks_fused"]["bare_ms"] < results["chunks_reference"]["bare_ms"]
    assert "first batch" in printed


@pytest.mark.slow  # trains steps of the demo's model
def test_loader_step_prints_a_row_per_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    argv = ["--cases", "demo", "--turns", "2", "--steps", "1", "--json", str(out)]
    assert main(loader_step.build_parser(), loader_step.run, argv) == 0
    found = json.loads(out.read_text())["demo"]
    assert all(min(found[workers]["CPU"]) > 0.1 for workers in loader_step.WORKERS)
    assert capsys.readouterr().out.count("| demo |") == len(loader_step.WORKERS)


def test_the_plan(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    argv = ["--images", "20000", "--shards", "31", "--mix-shards", "4", "--json", str(out)]
    assert main(plan.build_parser(), plan.run, argv) == 0
    found = json.loads(out.read_text())
    rows = found["plans"]
    assert [row["world"] for row in rows][-1] == 4096
    assert all(row["padding"] < 0.2 and row["max_open_shards"] <= 31 for row in rows)
    assert rows[0]["max_open_shards"] <= 8
    sizes = [row["sizes"] for row in found["sizes"]]
    assert sizes == sorted(sizes, reverse=True)
