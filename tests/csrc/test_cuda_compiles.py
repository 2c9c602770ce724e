"""The CUDA kernels compile, link and register, and their machine code is as intended; no GPU is needed."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.machine_code import MachineCode, find_disassembler, read_machine_code
from pipeline.csrc import build
from pipeline.csrc.recipe import SOURCES, find_compiler, make_recipe, run_compiler
from pipeline.model.ops import sampling

pytestmark = pytest.mark.skipif(find_compiler("cuda") is None, reason="no nvcc (install the CUDA toolkit)")
OPERATORS = ("ms_deform_attn", "ms_deform_attn_fused")


@pytest.fixture(scope="module")
def library() -> Path:
    return build.build("cuda")


@cache  # reading a library takes seconds
def functions(library: Path, arch: str) -> dict[str, MachineCode]:
    """Machine code of each fast kernel, by a name such as `backward bf16 32 fused shipped`."""
    if find_disassembler() is None:
        pytest.skip("no cuobjdump (in the CUDA toolkit, and in Triton)")
    return read_machine_code(library, arch)


def test_cuda_source_compiles_and_registers(library: Path) -> None:
    flags = build.facts(library)["flags"]
    for arch in ("80", "90"):
        assert f"-gencode=arch=compute_{arch},code=sm_{arch}" in flags
    if not (torch.version.cuda and torch.backends.cuda.is_built()):
        pytest.skip("this torch has no CUDA, so the library cannot be loaded")
    assert sampling.choose("cuda", "cuda") == "cuda"
    for name in (name + part for name in OPERATORS for part in ("", "_backward", "_backward_ordered")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"deformable_detr::{name}", "CUDA")


@pytest.mark.slow
def test_cuda_source_compiles_for_blackwell(tmp_path: Path) -> None:
    """The default library carries it as PTX of 9.0: toolkits before 12.8 do not know sm_100."""
    compiler = find_compiler("cuda")
    assert compiler
    if "sm_100" not in run_compiler([compiler.path, "--list-gpu-code"]):
        pytest.skip(f"{compiler.name} does not know sm_100")
    what = make_recipe("cuda")
    include = ["-isystem", f"{Path(torch.__file__).parent}/include"]
    source = str(SOURCES / what.units[0].source)
    flags = [flag for flag in what.flags if not flag.startswith("--threads")]
    call = [compiler.path, *flags, *include, "-cubin", "-arch=sm_100", source, "-o", f"{tmp_path}/op.cubin"]
    run_compiler(call)
    for name, code in functions(tmp_path / "op.cubin", "sm_100").items():
        assert code.count("LDG.E.128"), name


def test_cuda_library_has_hopper_code(library: Path) -> None:
    """Maps are read 16 bytes at a time, results written so, and grad_value added to so; nothing spills."""
    shipped = {name: code for name, code in functions(library, "sm_90").items() if code.variant == "shipped"}
    assert len(shipped) == 3 * 4 * 2 * 2  # types, channels, plain and fused, forward and backward
    for name, code in shipped.items():
        assert code.count("LDG.E.128") >= 8, name
        assert not code.spills(), name
        assert code.stack == 0, name
        if code.direction == "forward":
            assert code.count("STG.E.EF.128") == 1, name
            assert not code.count("RED"), name
        else:
            assert code.count("REDG.E.ADD.F32x4") >= 8, name
            scalar = code.count("REDG.E.ADD.F32.")  # of the fused form only, to reference points
            assert scalar == (4 if code.form == "fused" else 0), name


def test_cuda_library_has_the_kernels_that_can_be_chosen(library: Path) -> None:
    """They spill 16 bytes at most, and those are read once per row, in no loop over points."""
    shipped = functions(library, "sm_90")
    chosen = {name: code for name, code in shipped.items() if code.variant != "shipped"}
    assert len(chosen) == 2 * 4 * 2 + 3 * 2  # sectors: types, channels, forms; specialised: types, block sizes
    for name, code in chosen.items():
        assert all(depth <= 1 for depth in code.spills()), name
        assert code.stack <= 16, name
        limit = 80 if code.direction == "backward" else 64  # as many blocks on a processor as of the shipped kernels
        assert code.registers <= limit, name


def test_specialised_forward_reads_several_points_at_once(library: Path) -> None:
    """Between two loads of pixels that wait, more are in flight than a point's four; the rest is as shipped."""
    for name, code in functions(library, "sm_90").items():
        if code.variant.startswith("specialised"):
            assert code.count("STG.E.EF.128") == 1, name
            assert not code.count("RED"), name
            assert longest_run(code, "LDG.E.128") > 4, name
        elif code.direction == "forward":
            assert longest_run(code, "LDG.E.128") <= 4, name


def longest_run(code: MachineCode, load: str) -> int:
    """The most loads between two multiply-adds, or between one and a branch: they do not wait for each other."""
    longest = run = 0
    for _, text in code.instructions:
        if load in text:
            run += 1
            longest = max(longest, run)
        elif "FFMA" in text or "BRA" in text or "BSYNC" in text:
            run = 0
    return longest


@pytest.mark.parametrize("channels", [16, 32, 64, 128])
def test_backward_reductions_fill_sectors_if_asked(library: Path, channels: int) -> None:
    """A lane's second reduction follows the first of the last lane: half a row further; as shipped 16 bytes further."""
    for name, code in functions(library, "sm_90").items():
        if code.direction == "forward" or code.channels != channels or code.dtype == "fp32":
            continue
        places = [re.search(r"\.64(?:\+0x([0-9a-f]+))?\]", text) for _, text in code.instructions if "F32x4" in text]
        offsets = {int(place[1] or "0", 16) for place in places if place}
        assert offsets == {0, 4 * channels // 2 if code.variant == "sectors" else 16}, name
        shipped = functions(library, "sm_90")[replace(code, variant="shipped").name]
        assert code.count("REDG.E.ADD.F32x4") == shipped.count("REDG.E.ADD.F32x4"), name


def test_cuda_library_has_ampere_code(library: Path) -> None:
    """Without vector reductions: one reduction per element."""
    for name, code in functions(library, "sm_80").items():
        assert code.count("LDG.E.128") >= 8, name
        assert not any("F32x4" in text for _, text in code.instructions), name
        if code.direction == "backward":
            assert code.count("RED.E.ADD.F32") >= 16, name
