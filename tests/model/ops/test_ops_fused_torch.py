"""The fused operator under torch's checks, compilers and exports, and with bad input."""

import pytest
import torch
from support.operator import SHAPES, device, fused_inputs
from torch import Tensor

from pipeline.csrc import build
from pipeline.errors import OpError
from pipeline.model.ops import sampling

__all__ = ["device"]  # the fixture


# torch's own tracing looks at .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("dtype", "coordinates"), [(torch.float32, 2), (torch.bfloat16, 4)])
@pytest.mark.parametrize("grad", [True, False])
def test_fused_opcheck_passes(device: str, dtype: torch.dtype, coordinates: int, grad: bool) -> None:
    """Schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes."""
    value, shapes, *rest = fused_inputs(
        device, coordinates, queries=3, heads=2, dtype=dtype, shapes=SHAPES[:2], grad=grad
    )
    build.load(device)
    if not sampling.has_fused_kernel(device):
        pytest.skip(f"no fused kernel for {device}")
    flat = [size for shape in shapes for size in shape]
    torch.library.opcheck(torch.ops.deformable_detr.ms_deform_attn_fused, (value, *rest, flat))
    if not grad:
        arguments = (torch.ones(2, 3, 16, device=device, dtype=dtype), value, *rest, flat)
        for wanted in ([True] * 4, [False, True, False, True]):
            torch.library.opcheck(torch.ops.deformable_detr.ms_deform_attn_fused_backward, (*arguments, wanted))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fused_compiles_without_graph_breaks(device: str, backend: str) -> None:
    def call(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return sampling.ms_deform_attn_fused(value * 2, SHAPES, references.sigmoid(), offsets, logits).relu()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for queries in (5, 9):
        value, _, *rest = fused_inputs(device, queries=queries, dtype=torch.float32, grad=True)
        results = []
        for function in (call, compiled):
            output = function(value, *rest)
            results.append([output, *torch.autograd.grad(output.sum(), (value, *rest))])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-5)


class Sampling(torch.nn.Module):
    def forward(self, value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return sampling.ms_deform_attn_fused(value, SHAPES, references, offsets, logits) + 1


def test_fused_export_gives_same_result(device: str) -> None:
    value, _, *rest = fused_inputs(device, dtype=torch.float32)
    sampling.choose("auto", device)
    queries = torch.export.Dim("queries", min=2, max=1000)
    dynamic = ({}, {1: queries}, {1: queries}, {1: queries})
    program = torch.export.export(Sampling(), (value, *rest), dynamic_shapes=dynamic)
    assert any("ms_deform_attn" in str(node.target) for node in program.graph.nodes)
    value, _, *rest = fused_inputs(device, dtype=torch.float32, queries=11)
    torch.testing.assert_close(program.module()(value, *rest), Sampling()(value, *rest), rtol=1e-5, atol=1e-5)


GOOD = fused_inputs("cpu", dtype=torch.float32)
NAMES = ("value", "spatial_shapes", "reference_points", "offsets", "logits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": GOOD[0][0]}, r"value.*\[N, S, M, D\]"),
        ({"value": GOOD[0][:1]}, "value"),
        ({"value": GOOD[0][:, 1:]}, "spatial_shapes.*35"),
        ({"spatial_shapes": SHAPES[:3]}, "spatial_shapes"),
        ({"offsets": GOOD[3][..., :1]}, r"\(x, y\)"),
        ({"logits": GOOD[4][:, 1:]}, "logits"),
        ({"reference_points": GOOD[2][..., :1]}, r"reference_points.*\[2, 7, 4, 2\]"),
        ({"reference_points": GOOD[2][:, 1:]}, "reference_points"),
        ({"reference_points": GOOD[2][:, :, 0]}, "reference_points"),
        ({"reference_points": GOOD[2].bfloat16()}, "reference_points.*torch.float32.*bfloat16"),
        ({"reference_points": GOOD[2].double()}, "torch.float32"),
        ({"reference_points": GOOD[2].to("meta")}, "one device"),
        ({"value": GOOD[0].double()}, "torch.float64"),
        ({"offsets": GOOD[3].int()}, "fp64, fp32"),
        ({"offsets": GOOD[3].to("meta")}, "one device"),
        ({"impl": "cuda"}, "model.op=auto"),
        ({"impl": "gpu"}, "'gpu'"),
    ],
)
def test_fused_bad_input_names_argument(change: dict[str, object], message: str) -> None:
    with pytest.raises(OpError, match=message):
        sampling.ms_deform_attn_fused(**{**dict(zip(NAMES, GOOD, strict=True)), **change})  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    "change",
    [
        {"value": GOOD[0][:, 1:]},
        {"reference_points": GOOD[2][:, 1:]},
        {"reference_points": GOOD[2][..., :1]},
        {"reference_points": GOOD[2].double()},
        {"offsets": GOOD[3][:, 1:]},
        {"offsets": GOOD[3].double(), "logits": GOOD[4].double()},
        {"logits": GOOD[4].bfloat16()},
        {"logits": GOOD[4][..., :2]},
        {"spatial_shapes": SHAPES[:3]},
        {"spatial_shapes": [*SHAPES[:2], (2**31, 2**31), (1, 1)]},
    ],
)
def test_fused_bad_input_is_refused_by_bare_operator(change: dict[str, object]) -> None:
    """A direct call of torch.ops raises an error instead of reading out of bounds."""
    build.load("cpu")
    value, shapes, *rest = {**dict(zip(NAMES, GOOD, strict=True)), **change}.values()
    flat = [size for shape in shapes for size in shape]  # type: ignore[attr-defined]  # a list of pairs
    with pytest.raises(RuntimeError, match="ms_deform_attn"):
        torch.ops.deformable_detr.ms_deform_attn_fused(value, *rest, flat)
