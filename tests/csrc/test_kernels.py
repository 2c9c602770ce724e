"""The choice of CUDA kernels: its words, its bits, and how a library gets it. No GPU is needed."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.csrc import build
from pipeline.csrc.kernels import VARIABLE, Kernels, choose_kernels, parse_kernels
from pipeline.csrc.recipe import SOURCES, find_compiler
from pipeline.errors import OpError


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", Kernels.SHIPPED),
        ("shipped", Kernels.SHIPPED),
        ("sectors", Kernels.SECTORS),
        (" Specialised, large_tiles,", Kernels.SPECIALISED | Kernels.LARGE_TILES),
        ("generic,specialised,sectors,large_tiles,neighbours", ~Kernels.SHIPPED),
    ],
)
def test_parse_kernels_takes_words_between_commas(names: str, expected: Kernels) -> None:
    assert parse_kernels(names) == expected


def test_parse_kernels_unknown_word_names_variable_and_words() -> None:
    with pytest.raises(OpError, match=f"{VARIABLE}.*'fast'.*specialised.*neighbours") as error:
        parse_kernels("sectors,fast")
    assert error.value.exit_code == 2


def test_kernels_have_the_bits_of_the_header() -> None:
    header = (SOURCES / "ms_deform_attn_launch.cuh").read_text(encoding="utf-8")
    found = re.findall(r"^    k(\w+) = (\d+),\s+//", header, re.MULTILINE)
    bits = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper(): int(bit) for name, bit in found}
    assert bits == {kernel.name: kernel.value for kernel in Kernels}


@pytest.fixture(scope="module")
def library() -> Path:
    if find_compiler("cuda") is None:
        pytest.skip("no nvcc (install the CUDA toolkit)")
    if not (torch.version.cuda and torch.backends.cuda.is_built()):
        pytest.skip("this torch has no CUDA, so the library cannot be loaded")
    return build.load("cuda")


@pytest.fixture
def restored(library: Path) -> Iterator[None]:
    before = choose_kernels(library)
    yield
    choose_kernels(library, before)


def test_choose_kernels_keeps_the_choice(library: Path, restored: None) -> None:
    for kernels in (Kernels.GENERIC, ~Kernels.GENERIC, Kernels.SHIPPED):
        assert choose_kernels(library, kernels) == kernels
        assert choose_kernels(library) == kernels


def test_load_chooses_the_kernels_of_the_environment(
    library: Path, restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "sectors,neighbours")
    build.load.__wrapped__("cuda")
    assert choose_kernels(library) == Kernels.SECTORS | Kernels.NEIGHBOURS
    monkeypatch.setenv(VARIABLE, "none")
    with pytest.raises(OpError, match=VARIABLE):
        build.load.__wrapped__("cuda")
