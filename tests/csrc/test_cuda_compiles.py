"""The CUDA kernels compile, link and register, and their machine code is as intended; no GPU is needed."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.csrc import build
from pipeline.csrc.recipe import SOURCES, find_compiler, make_recipe, run_compiler
from pipeline.model.ops import sampling

pytestmark = pytest.mark.skipif(find_compiler("cuda") is None, reason="no nvcc (install the CUDA toolkit)")
OPERATORS = ("ms_deform_attn", "ms_deform_attn_fused")


@pytest.fixture(scope="module")
def library() -> Path:
    return build.build("cuda")


def disassembler() -> str | None:
    """The toolkit's cuobjdump, or the one of Triton in torch."""
    triton = Path(torch.__file__).parents[1] / "triton/backends/nvidia/bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.fspath(triton))


def functions(library: Path, arch: str) -> dict[str, str]:
    """Machine code of each fast kernel, by a readable name such as `backward bfloat16 4 Fused`."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump (in the CUDA toolkit, and in Triton)")
    found = {}
    for text in run_compiler([tool, "-sass", "-arch", arch, str(library)]).split("Function : ")[1:]:
        name = re.match(r"\S*fast_(forward|backward)_kernelI(\w+?)Li(\d+)E\S*?(Plain|Fused)Points", text)
        if name:
            found[" ".join(name.groups())] = text
    return found


def count(code: str, instruction: str) -> int:
    return len(re.findall(rf"\b{re.escape(instruction)}", code))


def test_cuda_source_compiles_and_registers(library: Path) -> None:
    flags = build.facts(library)["flags"]
    for arch in ("80", "90"):
        assert f"-gencode=arch=compute_{arch},code=sm_{arch}" in flags
    if not (torch.version.cuda and torch.backends.cuda.is_built()):
        pytest.skip("this torch has no CUDA, so the library cannot be loaded")
    assert sampling.choose("cuda", "cuda") == "cuda"
    for name in (name + part for name in OPERATORS for part in ("", "_backward", "_backward_ordered")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"deformable_detr::{name}", "CUDA")


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
        assert count(code, "LDG.E.128"), name


def test_cuda_library_has_hopper_code(library: Path) -> None:
    """Maps are read 16 bytes at a time, results written so, and grad_value added to so; nothing spills."""
    code = functions(library, "sm_90")
    assert len(code) == 3 * 4 * 2 * 2  # types, channels, plain and fused, forward and backward
    for name, text in code.items():
        assert count(text, "LDG.E.128") >= 8, name
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} spills"
        if name.startswith("forward"):
            assert count(text, "STG.E.EF.128") == 1, name
            assert not count(text, "RED"), name
        else:
            assert count(text, "REDG.E.ADD.F32x4") >= 8, name
            scalar = count(text, "REDG.E.ADD.F32.")  # of the fused form only, to reference points
            assert scalar == (4 if "Fused" in name else 0), name


def test_cuda_library_has_ampere_code(library: Path) -> None:
    """Without vector reductions: one reduction per element."""
    for name, text in functions(library, "sm_80").items():
        assert count(text, "LDG.E.128") >= 8, name
        assert "F32x4" not in text
        if name.startswith("backward"):
            assert count(text, "RED.E.ADD.F32") >= 16, name
