"""The CUDA kernels compile, link and register; no GPU is needed for that."""

import pytest
import torch

from pipeline.csrc import build
from pipeline.csrc.recipe import find_compiler
from pipeline.model import ops

pytestmark = pytest.mark.skipif(find_compiler("cuda") is None, reason="no nvcc (install the CUDA toolkit)")


def test_compiles_and_registers() -> None:
    library = build.build("cuda")
    flags = build.facts(library)["flags"]
    for arch in ("80", "90"):
        assert f"-gencode=arch=compute_{arch},code=sm_{arch}" in flags
    if not (torch.version.cuda and torch.backends.cuda.is_built()):
        pytest.skip("this torch has no CUDA, so the library cannot be loaded")
    assert ops.choose("cuda", "cuda") == "cuda"
    for name in ("ms_deform_attn", "ms_deform_attn_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"deformable_detr::{name}", "CUDA")
