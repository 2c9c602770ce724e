"""The parts of benchmarks/gpu.py that need no GPU: the plan, the check, the training step, the file, the refusal."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from jobs.cli import main
from pipeline.csrc.recipe import find_compiler

TINY = replace(gpu.SMALL, shapes=[(7, 6), (3, 3)], channels=16)


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(gpu.build_parser(), gpu.run, ["--out", str(tmp_path)]) != 0
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_plan_covers_what_was_promised() -> None:
    rows = list(gpu.measurements())
    assert {row.case.batch for row in rows} == {1, 2, 4}
    assert {row.form for row in rows} == set(gpu.FORMS)
    assert {row.dtype for row in rows} == {torch.float32, torch.bfloat16}
    assert {row.case.queries for row in rows} == {None, 300}
    assert rows[0].case.batch == 2  # the targets' size comes first


@pytest.mark.parametrize("form", ["fast", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_on_the_cpu(form: str, dtype: torch.dtype) -> None:
    row = gpu.Measurement(TINY, True, dtype, form)
    result = gpu.check(row, "cpu")
    assert result["ok"], result
    assert gpu.compulsory_bytes(row) > 0


def test_check_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.ops.ms_deform_attn

    def wrong(*args: object, **options: object) -> torch.Tensor:
        return right(*args, **options) * 1.001  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(gpu.ops, "ms_deform_attn", wrong)
    assert not gpu.check(gpu.Measurement(TINY, True, torch.float32, "fast"), "cpu")["ok"]


@pytest.mark.parametrize("bf16", [False, True])
def test_training_step_on_the_cpu(bf16: bool) -> None:
    model = {
        "hidden_dim": 32,
        "heads": 2,
        "enc_layers": 1,
        "dec_layers": 1,
        "ffn_dim": 32,
        "queries": 20,
        "backbone": {"name": "conv5", "weights": "none", "norm": "group", "width": 8},
    }
    result = gpu.training_step("cpu", bf16, "cpu", (64, 96), 1, **model)
    assert result["images_s"] > 0


def test_results_are_kept(tmp_path: Path) -> None:
    results = {"versions": {**gpu.versions(), "gpu": "NVIDIA H100 80GB HBM3"}, "times": []}
    path = gpu.write(results, tmp_path)
    assert path.name.endswith("_nvidia-h100-80gb-hbm3.json")
    assert json.loads(path.read_text())["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(find_compiler("cuda") is None, reason="no nvcc (install the CUDA toolkit)")
def test_kernels_can_be_chosen() -> None:
    """How the generic kernels are timed where the fast ones would run."""
    if not (torch.version.cuda and torch.backends.cuda.is_built()):
        pytest.skip("this torch has no CUDA, so the library cannot be loaded")
    assert gpu.kernels() == "automatic"
    try:
        assert gpu.kernels("generic") == "generic"
    finally:
        assert gpu.kernels("automatic") == "automatic"
