"""`python -m jobs.doctor` for an operator that is built, can be built, cannot be built, or is damaged."""

from pathlib import Path

import pytest
import torch

from jobs import doctor
from jobs.cli import main
from pipeline.csrc import build
from pipeline.csrc.recipe import find_compiler
from pipeline.model.ops import sampling


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(doctor.build_parser(), doctor.run, [])
    return code, capsys.readouterr().out


def test_built(capsys: pytest.CaptureFixture[str]) -> None:
    library = build.build("cpu")
    code, text = report(capsys)
    assert code == 0
    assert torch.__version__ in text
    assert f"library    {library}" in text
    assert (
        f"auto       cpu, because the library above loads; on this processor it runs {build.instruction_set()}" in text
    )


def test_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_compiler("cpu")
    monkeypatch.setenv("DEFORMABLE_OP_CACHE", str(tmp_path))
    code, text = report(capsys)
    assert code == 0
    assert "which the first call builds" in text
    assert not list(tmp_path.iterdir())  # it starts and builds nothing
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text = report(capsys)
    assert code == 1
    assert "fix        install a C++ compiler, then python -m pipeline.csrc.build --device cpu" in text


def test_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good = build.build("cpu")
    monkeypatch.setenv("DEFORMABLE_OP_CACHE", str(tmp_path))
    (tmp_path / good.parent.name).mkdir()
    (tmp_path / good.parent.name / good.name).write_text("damaged")
    (tmp_path / good.parent.name / "build.json").write_bytes((good.parent / "build.json").read_bytes())
    caches = (build.load, sampling._choose)
    for cache in caches:
        cache.cache_clear()
    try:
        code, text = report(capsys)
        assert code == 1
        assert "auto       torch, because it does not load: python -m pipeline.csrc.build --device cpu --force" in text
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize(("asked", "shown"), [("", "shipped"), (" Sectors,specialised", "specialised,sectors")])
def test_kernels_asked_for_are_shown(
    asked: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEFORMABLE_OP_KERNELS", asked)
    assert f"kernels    {shown} (DEFORMABLE_OP_KERNELS, on GPUs)" in report(capsys)[1]


def test_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DEFORMABLE_OP_KERNELS", "fastest")
    assert main(doctor.build_parser(), doctor.run, []) == 2
    assert "it takes shipped" in capsys.readouterr().err
