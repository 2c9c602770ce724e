"""What benchmarks/gpu*.py do without a GPU: the plan, the check, the step, the processes, the file, the refusal."""

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ROOT

from benchmarks import gpu, gpu_operator, gpu_step
from benchmarks.gpu_operator import CANDIDATES, FORMS, SMALL, Measurement
from jobs.cli import main
from pipeline.csrc.kernels import Kernels

TINY = replace(SMALL, shapes=[(7, 6), (3, 3)], channels=16)
TINY_MODEL = (
    "model.hidden_dim=32",
    "model.heads=2",
    "model.enc_layers=1",
    "model.dec_layers=1",
    "model.ffn_dim=32",
    "model.queries=20",
    "model.backbone.name=conv5",
    "model.backbone.norm=group",
    "model.backbone.width=8",
)
# A GPU machine has torch, torchvision, scipy, PyYAML and the wheels of gpu_machine/prepare.sh; these it lacks.
BARE = """
import sys
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "deepspeed", "mlflow", "pycocotools", "webdataset", "psutil"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Lacking())
import benchmarks.gpu, benchmarks.gpu_machine.kernels
from benchmarks.gpu_step import Variant, measure_step
print(measure_step(Variant("fp32"), (64, 96), 1, "cpu", overrides=tuple(sys.argv[1:]))["ms"])
"""


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(gpu.build_parser(), gpu.run, ["--out", str(tmp_path)]) != 0
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_plan_covers_what_was_promised() -> None:
    rows = list(gpu_operator.measurements())
    assert {row.case.batch for row in rows} == {1, 2, 4}
    assert {row.form for row in rows} == {*FORMS, *CANDIDATES}
    assert {row.dtype for row in rows} == {torch.float32, torch.bfloat16}
    assert {row.case.queries for row in rows} == {None, 300}
    assert rows[0].case.batch == 2  # the targets' size comes first


@pytest.mark.parametrize("form", ["fast", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_on_the_cpu(form: str, dtype: torch.dtype) -> None:
    row = Measurement(TINY, True, dtype, form)
    result = gpu_operator.check(row, "cpu")
    assert result["ok"], result
    assert gpu_operator.compulsory_bytes(row) > 0


def test_check_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_operator.sampling.ms_deform_attn

    def wrong(*args: object, **options: object) -> torch.Tensor:
        return right(*args, **options) * 1.001  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(gpu_operator.sampling, "ms_deform_attn", wrong)
    assert not gpu_operator.check(Measurement(TINY, True, torch.float32, "fast"), "cpu")["ok"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measure_step_on_the_cpu_runs_the_engine_and_new_sizes(precision: Any) -> None:
    variant = gpu_step.Variant(precision, channels_last=precision == "bf16")
    row = gpu_step.measure_step(variant, (96, 128), 1, "cpu", new_sizes=1, overrides=TINY_MODEL)
    assert row["images_s"] == pytest.approx(gpu_step.IMAGES / row["ms"] * 1e3)
    assert row["precision"] == precision
    assert [len(pair) for pair in row["new_sizes_ms"]] == [2]


def test_it_runs_where_only_torch_and_a_few_packages_are() -> None:
    command = [sys.executable, "-c", BARE, *TINY_MODEL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0


def test_work_prints_a_line_for_each_task_also_after_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    def fault() -> dict[str, Any]:
        raise RuntimeError("an illegal memory access was encountered")

    gpu.work(iter([("a", lambda: {"ms": 1.0}), ("b", fault), ("c", lambda: {"ms": 2.0})]))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("row") for line in lines] == [{"ms": 1.0}, None, {"ms": 2.0}]
    assert lines[1]["left_out"].startswith("b: RuntimeError: an illegal memory access")


@pytest.mark.parametrize(
    ("code", "seconds", "rows", "fault"),
    [
        ("print('{\"row\": 1}'); print('a warning')", 60, [{"row": 1}], ""),
        ("print('{\"row\": 1}', flush=True); import os; os.abort()", 60, [{"row": 1}], "code -6"),
        ("print('{\"row\": 1}', flush=True); import time; time.sleep(600)", 3, [{"row": 1}], "no time left"),
    ],
)
def test_run_unit_keeps_the_rows_of_a_process_that_dies(
    code: str, seconds: float, rows: list[dict[str, Any]], fault: str
) -> None:
    taken: list[dict[str, Any]] = []
    found = gpu.run_unit([sys.executable, "-c", code], seconds, taken.append)
    assert taken == rows
    assert fault in found
    assert bool(fault) == bool(found)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A GPU whose units are not run: each gives a row, the part `times` dies after it."""
    commands: list[list[str]] = []

    def run_unit(command: list[str], seconds: float, take: Any) -> str:
        commands.append(command)
        take({"row": {"ok": True, "ms": 1.0}})
        return "its process ended with code -6" if "times" in command else ""

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_unit", run_unit)
    monkeypatch.setattr(gpu, "versions", lambda: {"date": "2026-11-29T00:00:00", "gpu": "pretended"})
    return commands


def test_run_gives_each_part_a_process_and_fails_if_one_dies(pretended: list[list[str]], tmp_path: Path) -> None:
    assert main(gpu.build_parser(), gpu.run, ["--out", str(tmp_path), "--variants", "fp32", "bf16"]) == 1
    units = [command[command.index("--unit") + 1] for command in pretended]
    assert units == ["checks", "steps:fp32", "steps:bf16", "times"]
    for command in pretended:  # what the processes get is a command line of this command
        gpu.build_parser().parse_args(command[3:])
    kept = json.loads((tmp_path / "2026-11-29_pretended.json").read_text(encoding="utf-8"))
    assert [len(kept[part]) for part in gpu.PARTS] == [1, 2, 1]
    assert kept["left_out"] == ["times: its process ended with code -6"]


def test_run_of_chosen_parts_within_no_time_leaves_them_out(pretended: list[list[str]], tmp_path: Path) -> None:
    argv = ["--out", str(tmp_path), "--parts", "steps", "--budget", "0"]
    assert main(gpu.build_parser(), gpu.run, argv) == 0
    assert pretended == []
    (path,) = tmp_path.iterdir()
    left_out = json.loads(path.read_text(encoding="utf-8"))["left_out"]
    assert left_out == [f"steps:{name}: no time left" for name in list(gpu_step.VARIANTS)[:3]]


def test_versions_on_a_machine_without_git_do_without_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("git")

    monkeypatch.setattr(gpu.subprocess, "run", missing)
    assert gpu.versions()["commit"] == "unknown"


def test_results_are_kept(tmp_path: Path) -> None:
    results = {"versions": {**gpu.versions(), "gpu": "NVIDIA H100 80GB HBM3"}, "times": []}
    path = gpu.write(results, tmp_path)
    assert path.name.endswith("_nvidia-h100-80gb-hbm3.json")
    assert json.loads(path.read_text())["versions"]["torch"] == torch.__version__


def test_kernels_of_a_form_are_the_generic_the_shipped_or_the_candidates() -> None:
    assert gpu_operator.kernels_of("generic") == Kernels.GENERIC
    assert {gpu_operator.kernels_of(form) for form in FORMS[1:]} == {Kernels.SHIPPED}
    every = functools.reduce(Kernels.__or__, (gpu_operator.kernels_of(form) for form in CANDIDATES))
    assert every == gpu_operator.kernels_of("fused_all") == ~Kernels.GENERIC
