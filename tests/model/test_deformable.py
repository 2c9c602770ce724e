"""The detector as a whole: parameters, initialisation, outputs, padding, precision, errors, synchronisation."""

import math
from typing import Any

import pytest
import torch
from support.host_syncs import RefuseHostSyncs
from support.model import VARIANTS, padded_images, random_targets, small_config
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import generalized_box_iou

from pipeline.config import LossConfig, ModelConfig
from pipeline.errors import ConfigError
from pipeline.model import DeformableDETR, build_criterion, build_model
from pipeline.model.boxes import cxcywh_to_xyxy

BATCH = padded_images((96, 128), (80, 100))
MIXED = {
    "own_level": {"cross_level": False},
    "fpn": {"neck": "fpn"},
    "bifpn": {"neck": "bifpn", "neck_layers": 2, "refine": True, "two_stage": True},
}


@pytest.fixture(scope="module", params=VARIANTS | MIXED)
def model(request: pytest.FixtureRequest) -> DeformableDETR:
    torch.manual_seed(0)
    return build_model(small_config(**(VARIANTS | MIXED)[request.param]))


def test_deformable_single_scale_has_published_size() -> None:
    model = build_model(ModelConfig(num_classes=91, levels=1), load_backbone=False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 33_844_193


@pytest.fixture(scope="module")
def full() -> DeformableDETR:
    return build_model(ModelConfig(num_classes=91, refine=True), load_backbone=False)


def test_deformable_outputs_have_documented_shapes(model: DeformableDETR) -> None:
    outputs = model(*BATCH)
    layers = [outputs, *outputs["aux_outputs"]]
    assert len(layers) == model.config.dec_layers
    for layer in layers:
        assert layer["pred_logits"].shape == (2, 12, 5)
        assert layer["pred_boxes"].shape == (2, 12, 4)
        assert ((layer["pred_boxes"] > 0) & (layer["pred_boxes"] < 1)).all()
    assert ("enc_outputs" in outputs) == model.config.two_stage
    if model.config.two_stage:
        assert outputs["enc_outputs"]["pred_logits"].shape == (2, 12 * 16 + 6 * 8 + 3 * 4, 5)


def test_deformable_every_tensor_has_one_name(model: DeformableDETR) -> None:
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_deformable_without_objects_every_parameter_has_gradient(
    model: DeformableDETR, counts: tuple[int, ...]
) -> None:
    model.zero_grad()
    criterion = build_criterion(LossConfig())
    criterion.total(criterion(model(*BATCH), random_targets(*counts), 5.0)).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function(*args, **(kwargs or {}))
        for value in returned if isinstance(returned, (tuple, list)) else (returned,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return returned


def test_deformable_memory_is_not_quadratic_in_objects(model: DeformableDETR) -> None:
    """2,000 objects in one image: forward, matching, losses and backward never hold a matrix of all pairs."""
    objects, targets = 2000, random_targets(2000, 1)
    with Largest() as pairs:
        generalized_box_iou(*2 * [cxcywh_to_xyxy(targets[0]["boxes"])])
    assert pairs.elements >= objects**2
    criterion = build_criterion(LossConfig())
    with Largest() as step:
        total = criterion.total(criterion(model(*BATCH), targets, objects + 1.0))
        total.backward()
    assert total.isfinite()
    assert 0 < step.elements < objects**2


def test_deformable_autocast_keeps_outputs_float32(model: DeformableDETR) -> None:
    model.eval()
    with torch.no_grad():
        exact = model(*BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(*BATCH)
    assert half["pred_boxes"].dtype == half["pred_logits"].dtype == torch.float32
    if not model.config.two_stage:  # there a rounded score may choose other proposals
        torch.testing.assert_close(half["pred_boxes"], exact["pred_boxes"], rtol=0, atol=0.05)


def test_deformable_forward_does_not_synchronise(model: DeformableDETR) -> None:
    with RefuseHostSyncs():
        model(*BATCH)


def test_deformable_image_does_not_depend_on_batch(model: DeformableDETR) -> None:
    """Group norm of Conv5 sees one image at a time, so an image's outputs depend on its own padded pixels only."""
    model.eval()
    images, mask = BATCH
    with torch.no_grad():
        together, alone = model(images, mask), model(images[1:], mask[1:])
    torch.testing.assert_close(together["pred_boxes"][1:], alone["pred_boxes"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_deformable_levels_have_strides(levels: int) -> None:
    model = build_model(small_config(levels=levels))
    strides = {1: [32], 2: [16, 32], 3: [8, 16, 32], 5: [8, 16, 32, 64, 128]}[levels]
    assert model.stride == strides[-1]
    features = model._features(torch.randn(1, 3, 128, 160))
    assert [tuple(f.shape[2:]) for f in features] == [(-(-128 // s), -(-160 // s)) for s in strides]
    assert len(model.input_proj) == levels
    model(torch.randn(1, 3, 128, 160), torch.zeros(1, 128, 160, dtype=torch.bool))


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@torch.no_grad()
def test_deformable_dc5_levels_have_strides(levels: int) -> None:
    """The last stage keeps the resolution of the one before; further levels halve from there."""
    backbone = {"name": "resnet50", "weights": "none", "dilation": True}
    model = build_model(small_config(levels=levels, backbone=backbone))
    strides = {1: [16], 2: [16, 16], 3: [8, 16, 16], 4: [8, 16, 16, 32], 5: [8, 16, 16, 32, 64]}[levels]
    assert model.stride == strides[-1]
    features = model._features(torch.randn(1, 3, 65, 96))
    assert [tuple(f.shape[2:]) for f in features] == [(-(-65 // s), -(-96 // s)) for s in strides]


def test_deformable_neck_follows_projections() -> None:
    torch.manual_seed(0)
    model = build_model(small_config(neck="bifpn", levels=4))
    images, _ = padded_images((128, 160))
    mixed = model._features(images)
    assert model.neck is not None
    plain, model.neck = model.neck, None
    for actual, expected in zip(mixed, plain(model._features(images)), strict=True):
        assert torch.equal(actual, expected)


def test_deformable_dropout_acts_in_training_only() -> None:
    model = build_model(small_config(dropout=0.3))
    torch.manual_seed(0)
    first = model(*BATCH)["pred_logits"]
    assert not torch.equal(model(*BATCH)["pred_logits"], first)
    torch.manual_seed(0)
    assert torch.equal(model(*BATCH)["pred_logits"], first)
    model.eval()
    assert torch.equal(model(*BATCH)["pred_logits"], model(*BATCH)["pred_logits"])


@pytest.mark.parametrize("size", [(63, 200), (200, 63), (1, 1), (64, 64)])
@torch.no_grad()
def test_pad_to_stride_pads_only_a_side_below_the_deepest_stride(size: tuple[int, int]) -> None:
    model = build_model(small_config(levels=4)).eval()
    images, mask = padded_images(size)
    by_hand, its_mask = torch.zeros(1, 3, max(64, size[0]), max(64, size[1])), torch.ones(1, *map(max, size, (64, 64)))
    by_hand[:, :, : size[0], : size[1]], its_mask[:, : size[0], : size[1]] = images, 0
    assert torch.equal(model.pad_to_stride(images, mask)[0], by_hand)
    assert torch.equal(model(images, mask)["pred_boxes"], model(by_hand, its_mask.bool())["pred_boxes"])


def test_two_stage_fewer_tokens_than_queries_raises() -> None:
    model = build_model(small_config(refine=True, two_stage=True, queries=100))
    with pytest.raises(ConfigError, match=r"model\.queries=100"):
        model(*padded_images((64, 64)))


def test_deformable_learning_rate_groups_match_tensors(full: DeformableDETR) -> None:
    """The recipe selects by substring; these are all the tensors it must and may find."""
    names = [name for name, p in full.named_parameters() if p.requires_grad]
    slow = [n for n in names if "sampling_offsets" in n or "reference_points" in n]
    assert len(slow) == 2 * 12 + 2
    backbone = [n for n in names if "backbone" in n]
    assert len(backbone) == 42
    assert not set(slow) & set(backbone)


def test_deformable_initialisation_is_published(full: DeformableDETR) -> None:
    for head in full.class_embed:
        torch.testing.assert_close(head.bias.detach(), torch.full((91,), -math.log(99)))
    small = [head.layers[-1].bias.tolist() for head in full.bbox_embed]
    assert small == [[0, 0, -2, -2]] + [[0, 0, 0, 0]] * 5
    assert not any(head.layers[-1].weight.any() for head in full.bbox_embed)
    assert all(torch.equal(head.layers[0].weight, full.bbox_embed[0].layers[0].weight) for head in full.bbox_embed)
    assert 0.95 < full.query_embed.weight.std() < 1.05
    assert not any(projection[0].bias.any() for projection in full.input_proj)
    assert [tuple(p[0].weight.shape) for p in full.input_proj] == [
        (256, 512, 1, 1),
        (256, 1024, 1, 1),
        (256, 2048, 1, 1),
        (256, 2048, 3, 3),  # the extra level sees raw C5
    ]


def test_two_stage_heads_start_at_zero() -> None:
    model = build_model(small_config(refine=True, two_stage=True))
    assert len(model.bbox_embed) == len(model.class_embed) == 4
    assert not any(head.layers[-1].bias.any() for head in model.bbox_embed)
    assert not hasattr(model, "query_embed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_deformable_gpu_step_synchronises_once(variant: str) -> None:
    """Forward, criterion and backward with synchronisation forbidden but for the matcher's transfer."""
    model = build_model(small_config(**VARIANTS[variant])).cuda()
    criterion = build_criterion(LossConfig())
    images, mask = (tensor.cuda() for tensor in BATCH)
    targets = [{k: v.cuda() for k, v in target.items()} for target in random_targets(3, 2)]
    match, num_boxes = criterion.matcher.__class__.__call__, torch.tensor(5.0, device="cuda")

    def allowed(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return match(*args)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    criterion.total(criterion(model(images, mask), targets, num_boxes)).backward()  # builds and tunes kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(criterion.matcher), "__call__", allowed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            criterion.total(criterion(model(images, mask), targets, num_boxes)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
