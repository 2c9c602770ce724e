"""Properties of all baselines: boxes in pixels, every batch trains, equal groups have equal losses, and they learn."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.baselines import CLASSES, NAMES, small
from support.distributed import run_ranks
from support.model import padded_images, random_targets
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from pipeline.config import AugmentConfig, DataConfig, LossConfig, OptimConfig, TrainConfig
from pipeline.data.loader import TrainLoader
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.engine.backend import PlainBackend
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine, StepResult
from pipeline.engine.zero import DeepSpeedBackend
from pipeline.model import build_criterion
from pipeline.model.baselines.base import GridAnchors, in_pixels, select_detections, unpadded_sizes
from pipeline.model.postprocess import postprocess
from pipeline.runtime import Runtime, single

OWN = LossConfig(classification="own")
TRAIN = TrainConfig(global_batch=6, micro_batch=2, zero_stage=1)
OPTIM = OptimConfig(lr=1e-3, backbone_lr=1e-3)
STEPS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baselines")
    annotations, images = write_synthetic(folder / "raw", images=20, seed=3, size=96)
    build_shards(annotations, images, folder / "shards", samples_per_shard=16)
    return folder / "shards"


def run_steps(
    runtime: Runtime, shards: Path, name: str, deepspeed: bool, without: str = "", backwards: bool = False
) -> list[StepResult]:
    torch.set_num_threads(1)
    module = LossModule(small(name), build_criterion(OWN))
    if deepspeed:
        engine = Engine(module, DeepSpeedBackend(module, TRAIN, OPTIM, runtime), runtime, seed=0)
    else:
        engine = Engine(module, PlainBackend(module, OPTIM, runtime.device), runtime, seed=0)
    augment = AugmentConfig(scales=(96, 112), max_size=160, crop_scales=(96,), crop_range=(64, 96))
    loader = TrainLoader(
        DataConfig(train=str(shards), workers=0, augment=augment), TRAIN, 0, runtime.rank, runtime.world
    )
    results = []
    for step, groups in zip(range(STEPS), loader.epoch(0), strict=False):
        chosen = [no_boxes(g) if without == "all" or (without == "one" and g.group == 0) else g for g in groups]
        results.append(engine.train_step(chosen[::-1] if backwards else chosen, step))
    state: Any = engine.backend.optimizer.state
    if not deepspeed:
        trained = [p for p in module.model.parameters() if p.requires_grad]
        assert all(p in state for p in trained)  # every parameter was reached, so no rank waits for another
    return results


def no_boxes(batch: Any) -> Any:
    offsets = torch.zeros_like(batch.target_offsets)
    return dataclasses.replace(
        batch, boxes_cxcywh=batch.boxes_cxcywh[:0], labels=batch.labels[:0], target_offsets=offsets
    )


@pytest.mark.parametrize("without", ["", "one", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_baseline_step_repeats_exactly(name: str, without: str, shards: Path) -> None:
    first, second = (run_steps(single(), shards, name, deepspeed=False, without=without) for _ in range(2))
    assert all(result.applied for result in first)
    assert [result.losses for result in first] == [result.losses for result in second]
    boxes = ("loss_box_reg", "loss_rpn_box_reg", "loss_bbox", "loss_centerness")
    values = [value for result in first for key, value in result.losses.items() if key in boxes]
    assert values
    assert all(value == 0 for value in values) == (without == "all")


def test_baseline_group_loss_does_not_depend_on_order(shards: Path) -> None:
    # anchors and proposals are sampled at random: by the group's own stream, whoever runs it and when
    one, other = (run_steps(single(), shards, "faster_rcnn", False, backwards=order) for order in (False, True))
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        assert b.losses == pytest.approx(a.losses, rel=1e-4, abs=1e-6), step


@pytest.mark.slow
def test_baseline_two_ranks_equal_one_process(shards: Path, tmp_path: Path) -> None:
    # Three groups on two ranks: one rank runs a weight-0 group; anchors and proposals are sampled at random.
    one = run_steps(single(), shards, "faster_rcnn", deepspeed=False)
    for rank in run_ranks(run_steps, 2, tmp_path, shards, "faster_rcnn", True):
        for step, (a, b) in enumerate(zip(one, rank, strict=True)):
            assert b.losses == pytest.approx(a.losses, rel=1e-5, abs=1e-6), step
            assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4), step


def test_baseline_sampling_follows_seed() -> None:
    model = small("faster_rcnn")
    images, mask = padded_images((128, 160), (96, 128))
    targets = random_targets(9, 4)

    def loss(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        found: dict[str, Tensor] = model(images, mask, targets)["losses"]
        return found

    assert all(torch.equal(value, loss(5)[name]) for name, value in loss(5).items())
    assert loss(5)["loss_objectness"] != loss(6)["loss_objectness"]


@pytest.mark.parametrize("name", NAMES)
def test_baseline_bf16_is_close_to_fp32(name: str) -> None:
    model = small(name)
    images, mask = padded_images((96, 128), (64, 90))
    targets = random_targets(3, 2)
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(model.train()(images, mask, targets)["losses"])
    assert all(value.dtype == torch.float32 for value in found[1].values())
    total, half_total = (torch.stack(list(losses.values())).sum() for losses in found)
    assert half_total.item() == pytest.approx(total.item(), rel=0.02)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        detections = model.eval()(images, mask)["detections"]
    assert all(d[key].dtype == torch.float32 for d in detections for key in ("scores", "boxes_xyxy"))


@pytest.mark.parametrize("name", NAMES)
def test_baseline_learns_one_batch(name: str) -> None:
    images, mask = padded_images((96, 160), (90, 100))
    targets = [
        {"labels": torch.tensor([0, 4]), "boxes": torch.tensor([[0.3, 0.4, 0.3, 0.5], [0.75, 0.6, 0.35, 0.6]])},
        {"labels": torch.tensor([2]), "boxes": torch.tensor([[0.6, 0.5, 0.5, 0.6]])},
    ]
    for image, target, (height, width) in zip(images, targets, unpadded_sizes(mask), strict=True):
        for (x, y, w, h), label in zip(target["boxes"], target["labels"], strict=True):
            rows = slice(int((y - h / 2) * height), int((y + h / 2) * height))
            columns = slice(int((x - w / 2) * width), int((x + w / 2) * width))
            image[:, rows, columns] += 3 * torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(int(label)))
    model, criterion = small(name), build_criterion(OWN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(45):
        torch.manual_seed(step)
        loss = criterion.total(criterion(model(images, mask, targets), targets, 3.0, 1.0))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    originals = torch.tensor([[192, 480], [45, 200]])  # height and width are scaled differently
    with torch.no_grad():
        found = postprocess(model.eval()(images, mask), originals, top_k=20)
    for target, detections, (height, width) in zip(targets, found, originals.tolist(), strict=True):
        (wanted,) = in_pixels([target], [(height, width)])
        for box, label in zip(wanted["boxes"], wanted["labels"], strict=True):
            mine = detections["labels"] == label
            best = detections["boxes_xyxy"][mine][0]  # the highest score of the class
            assert box_iou(box[None], best[None]).item() > 0.6, (name, label, best, box)
            assert detections["scores"][mine][0] > 0.3


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_baseline_detections_lie_in_image(name: str) -> None:
    sizes = [(1, 1), (37, 70), (64, 20)]
    images, mask = padded_images(*sizes)
    outputs = small(name).eval()(images, mask)
    assert outputs["input_sizes"].tolist() == [list(size) for size in sizes]
    for found, (height, width) in zip(outputs["detections"], sizes, strict=True):
        assert (found["boxes_xyxy"] >= 0).all()
        assert (found["boxes_xyxy"] <= torch.tensor([width, height, width, height])).all()
        assert (found["scores"].diff() <= 0).all()
        assert set(found["labels"].tolist()) <= set(range(CLASSES))


def test_in_pixels_drops_boxes_without_area() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 1e-9, 0.4]])
    (target,) = in_pixels([{"boxes": boxes, "labels": torch.tensor([3, 1])}], [(50, 100)])
    assert target["labels"].tolist() == [3]
    torch.testing.assert_close(target["boxes"], torch.tensor([[40.0, 15.0, 60.0, 35.0]]))


def test_grid_anchors_do_not_depend_on_padding() -> None:
    strides, sizes, ratios = (8, 16), ((32, 40), (64, 80)), (0.5, 1.0, 2.0)
    anchors = GridAnchors(strides, sizes, ratios)

    def at(height: int, width: int) -> tuple[Tensor, Tensor]:
        maps = [torch.zeros(1, 1, -(-height // s), -(-width // s), dtype=torch.bfloat16) for s in strides]
        (found,) = anchors(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), maps)
        (theirs,) = AnchorGenerator(sizes, (ratios,) * 2)(
            ImageList(torch.zeros(1, 3, height, width), [(height, width)]), [x.float() for x in maps]
        )
        return found, theirs

    found, theirs = at(64, 96)
    assert found.dtype == torch.float32
    assert torch.equal(found, theirs)
    odd, theirs = at(56, 88)
    assert not torch.equal(odd, theirs)
    assert {tuple(row) for row in odd.tolist()} <= {tuple(row) for row in found.tolist()}


def test_select_detections_keeps_best_of_each_class() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 11, 10], [50.0, 50, 90, 200], [0.0, 0, 10, 10]])
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.7], [0.3, 0.0], [0.05, 0.0]])
    (found,) = select_detections(
        [scores[None, :2], scores[None, 2:]], [boxes[None, :2], boxes[None, 2:]], [(100, 80)], 0.1, 0.5
    )
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7, 0.3])
    assert found["labels"].tolist() == [0, 1, 0]
    assert found["boxes_xyxy"].tolist() == [[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 80, 100]]


def test_own_losses_step_is_mean_over_groups() -> None:
    criterion = build_criterion(OWN)
    outputs = {"losses": {"loss_cls": torch.tensor(3.0), "loss_bbox": torch.tensor(1.0)}}
    losses = criterion(outputs, [], 17.0, torch.tensor(4.0))
    assert {name: float(value) for name, value in losses.items()} == {"loss_cls": 0.75, "loss_bbox": 0.25}
    assert float(criterion.total(losses)) == 1.0


def test_baseline_training_without_targets_raises() -> None:
    with pytest.raises(ValueError, match="targets"):
        small("fcos")(*padded_images((64, 64)))
