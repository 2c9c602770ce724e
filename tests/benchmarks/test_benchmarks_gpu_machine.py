"""The scripts for a GPU machine, as far as a machine without one can follow them."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

from benchmarks import gpu
from benchmarks.gpu_machine import kernels
from benchmarks.gpu_operator import fused_inputs
from benchmarks.op import LARGE
from jobs.cli import main
from pipeline.csrc.kernels import Kernels, parse_kernels

SCRIPTS = ROOT / "benchmarks" / "gpu_machine"
PARSERS = {
    "benchmarks.gpu": gpu.build_parser,
    "benchmarks.gpu_machine.kernels": kernels.build_parser,
}
TOOLS = ("python3", "nvcc", "ncu", "compute-sanitizer")
STUB = """#!/bin/bash
printf '%q ' "$(basename "$0")" "$@" >>"$CALLS"; echo >>"$CALLS"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the files that the scripts use; the programs in `tools` only record their calls."""
    for name in ("pipeline", "benchmarks", "jobs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copyfile(ROOT / "constraints.txt", tmp_path / "constraints.txt")
    test = Path("tests/model/ops/test_sampling.py")
    assert (ROOT / test).exists()
    (tmp_path / test).parent.mkdir(parents=True)
    (tmp_path / test).touch()
    (tmp_path / "tools").mkdir()
    for tool in TOOLS:
        (tmp_path / "tools" / tool).write_text(STUB, encoding="utf-8")
        (tmp_path / "tools" / tool).chmod(0o755)
    return tmp_path


def run_script(project: Path, script: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The result of the script, and the commands that it ran."""
    calls = project / "calls"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TORCH_CUDA_ARCH_LIST")}
    environment |= {"PATH": f"{project}/tools:{os.environ['PATH']}", "CALLS": str(calls), "OUT": str(project / "out")}
    command = ["bash", f"benchmarks/gpu_machine/{script}"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
    return done, [shlex.split(line) for line in lines]


def test_prepare_lays_the_wheels(project: Path) -> None:
    done, calls = run_script(project, "prepare.sh")
    assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call[:4] == ["python3", "-m", "pip", "download"]
    assert {"pydantic", "pydantic_core", "annotated-types", "typing-inspection"} <= set(call)
    assert (project / ".gpu_machine" / "wheels").is_dir()


@pytest.mark.parametrize(("script", "seconds"), [("first.sh", 300), ("second.sh", 330)])
def test_limits_of_a_run_fit_into_its_time(script: str, seconds: int) -> None:
    """The build, which has no limit, takes about 15 s for one architecture on 16 cores."""
    text = (SCRIPTS / script).read_text(encoding="utf-8")
    limits = [int(limit) for limit in re.findall(r"timeout (\d+)", text)]
    assert len(limits) >= 4
    assert sum(limits) <= seconds


@pytest.mark.parametrize("script", ["first.sh", "second.sh"])
def test_runs_give_commands_that_exist(project: Path, script: str) -> None:
    run_script(project, "prepare.sh")
    (project / "calls").unlink()
    (project / ".gpu_machine" / "wheels" / "a.whl").touch()
    done, calls = run_script(project, script)
    assert "unbound" not in done.stderr
    ours = [call[call.index(name) :] for call in calls for name in PARSERS if name in call]
    for name, *arguments in ours:
        PARSERS[name]().parse_args(arguments)
        if "--kernels" in arguments:
            chosen = [parse_kernels(names) for names in PARSERS[name]().parse_args(arguments).kernels]
            assert Kernels.SHIPPED in chosen
            assert ~Kernels.GENERIC in chosen
    assert {name for name, *_ in ours} == set(PARSERS)
    built = ["python3", "-m", "pipeline.csrc.build", "--device", "cuda"]
    assert calls.index(built) < min(k for k, call in enumerate(calls) if set(PARSERS) & set(call))
    assert any("pytest" in call and "tests/model/ops/test_sampling.py" in call for call in calls)


def test_run_without_prepare_says_what_to_do(project: Path) -> None:
    (project / "tools" / "python3").write_text("#!/bin/bash\nexit 1\n", encoding="utf-8")
    done, _ = run_script(project, "first.sh")
    assert done.returncode == 1
    assert "prepare.sh" in done.stderr


def test_kernels_without_a_gpu_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(kernels.build_parser(), kernels.run, []) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_fresh_offsets_are_1_to_4_pixels_long_and_the_same_for_each_query() -> None:
    _, _, offsets, _ = fused_inputs(LARGE, True, "cpu", torch.float32)
    fresh = kernels.fresh_offsets(offsets)
    assert fresh.shape == offsets.shape
    assert torch.equal(fresh, fresh[:1, :1].expand_as(fresh))
    length = torch.arange(1.0, 5.0).expand(fresh.shape[:-1])
    assert torch.allclose(fresh.abs().amax(-1), length)
