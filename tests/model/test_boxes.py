"""Box formats, GIoU of pairs, and the logit arithmetic of the box heads."""

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from pipeline.model.boxes import apply_delta, cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, xyxy_to_cxcywh

UNIT = st.floats(0, 1, width=32)


@given(st.lists(st.tuples(UNIT, UNIT, UNIT, UNIT), min_size=1, max_size=5))
def test_box_formats_are_inverse(rows: list[tuple[float, ...]]) -> None:
    boxes = torch.tensor(rows)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ([0.0, 0, 2, 2], [0.0, 0, 2, 2], 1.0),
        ([0.0, 0, 1, 1], [1.0, 0, 2, 1], 0.0),  # they touch
        ([0.0, 0, 1, 1], [3.0, 0, 4, 1], -0.5),  # half of the hull is empty
        ([0.0, 0, 2, 2], [0.0, 0, 1, 1], 0.25),  # one inside the other: GIoU is IoU
    ],
)
def test_generalized_iou_known_pairs(a: list[float], b: list[float], value: float) -> None:
    assert generalized_iou(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(value)


def test_generalized_iou_equals_torchvision() -> None:
    a, b = (cxcywh_to_xyxy(torch.rand(20, 4, generator=torch.Generator().manual_seed(s))) for s in (0, 1))
    matrix = torchvision.ops.generalized_box_iou(a, b)
    torch.testing.assert_close(generalized_iou(a, b), matrix.diagonal())
    torch.testing.assert_close(generalized_iou(a[:, None], b), matrix)


def test_generalized_iou_empty_boxes_are_finite() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.2, 0.2, 1e-20, 1e-20]], requires_grad=True)
    giou = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(boxes.detach()))
    giou.sum().backward()
    assert giou.isfinite().all()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


def test_generalized_iou_reads_no_number_in_its_backward() -> None:
    """On a GPU the host would wait for it."""
    boxes = torch.rand(5, 4, requires_grad=True)
    giou = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(boxes.detach().flip(0)))
    with profile(activities=[ProfilerActivity.CPU]) as record:
        giou.sum().backward()
    names = {event.key for event in record.key_averages()}
    assert "aten::mul" in names
    assert not {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"} & names


def test_inverse_sigmoid_is_bounded_inverse() -> None:
    x = torch.linspace(0.01, 0.99, 99)
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    torch.testing.assert_close(ends.sigmoid(), torch.tensor([1e-5, 1e-5, 1 - 1e-5, 1 - 1e-5]))


def test_apply_delta_point_and_box_references() -> None:
    zero = torch.zeros(3, 4)
    reference = torch.rand(3, 4) * 0.8 + 0.1
    torch.testing.assert_close(apply_delta(zero, reference), reference)
    from_point = apply_delta(zero, reference[:, :2])
    torch.testing.assert_close(from_point, torch.cat([reference[:, :2], torch.full((3, 2), 0.5)], dim=-1))
