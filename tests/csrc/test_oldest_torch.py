"""The operator compiles against the headers of the oldest torch that pyproject.toml allows; no GPU is needed."""

from pathlib import Path

import pytest

from benchmarks import compile_matrix
from benchmarks.compile_matrix import ARCHS, WITHOUT_OPTIMISATION, download_headers, oldest_torch
from benchmarks.machine_code import compile_for
from jobs.cli import main
from pipeline.csrc.recipe import SOURCES, find_compiler, make_recipe, run_compiler
from pipeline.errors import OpError

needs_nvcc = pytest.mark.skipif(find_compiler("cuda") is None, reason="no nvcc (install the CUDA toolkit)")


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch/include of that version."""
    try:
        return download_headers(oldest_torch(), tmp_path_factory.mktemp("torch"))
    except OpError as error:
        pytest.skip(str(error))


def test_cpu_source_compiles_against_the_oldest_torch(headers: Path) -> None:
    compiler = find_compiler("cpu")
    if compiler is None:
        pytest.skip("no C++ compiler")
    what = make_recipe("cpu")
    for unit in what.units[:1]:  # the others see no torch
        source = str(SOURCES / unit.source)
        run_compiler([compiler.path, *what.flags, *unit.flags, "-isystem", str(headers), "-fsyntax-only", source])


@needs_nvcc
def test_cuda_source_compiles_against_the_oldest_torch(headers: Path, tmp_path: Path) -> None:
    compile_for(["sm_90"], tmp_path / "op.fatbin", headers, WITHOUT_OPTIMISATION)


@needs_nvcc
@pytest.mark.slow  # twelve compilations
def test_compile_matrix_has_no_hole(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(compile_matrix.build_parser(), compile_matrix.run, [])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.count("ok, ") == 2 * len(ARCHS)


@needs_nvcc
def test_compile_matrix_names_the_torch_and_architecture_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty headers stand for a torch that the source does not fit."""
    monkeypatch.setattr(compile_matrix, "download_headers", lambda version, folder: tmp_path)
    monkeypatch.setattr(compile_matrix.torch, "__file__", str(tmp_path / "torch.py"))
    assert main(compile_matrix.build_parser(), compile_matrix.run, ["--archs", "sm_90"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("fails") == 2
    assert f"torch {oldest_torch()}, sm_90: " in printed.err
