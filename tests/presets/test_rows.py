"""Every preset of jobs/configs: what it states, how large it is, and that it trains and detects.

A preset is a YAML file with a `name`; the files that others name as their base have none. New ones join by themselves.
"""

import itertools
from dataclasses import asdict
from typing import Any

import pytest
import torch
import yaml
from support.paths import ROOT
from torch import Tensor

from pipeline.config import Config, flatten, load_config, override
from pipeline.data.batch import Batch
from pipeline.engine.backend import PlainBackend
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine
from pipeline.errors import ConfigError
from pipeline.model import Detector, build_criterion, build_model
from pipeline.model.postprocess import postprocess
from pipeline.presets.published import PUBLISHED, find_published
from pipeline.runtime import single

FOLDER = ROOT / "jobs" / "configs"
PRESETS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml")) if "name" in yaml.safe_load(path.read_text())}
# What makes a detector small; a setting is left out where the config refuses it because the detector does not read it.
SMALLER = (
    "model.backbone.weights=none",
    "model.hidden_dim=32",
    "model.heads=4",
    "model.enc_layers=1",
    "model.dec_layers=2",
    "model.ffn_dim=32",
    "model.queries=8",
    "model.neck_layers=1",
    "model.head_layers=1",
)
REFINE = {"model.refine": True}
TWO_STAGE = {**REFINE, "model.two_stage": True}
K1 = {"model.enc_points": 1, "model.dec_points": 1}
X101 = {**TWO_STAGE, "model.backbone.name": "resnext101_64x4d"}
DCN = {**X101, "model.backbone.deformable_conv": True}
GPU = {
    "data.pad_multiple": 64,
    "data.workers": 8,
    "model.merge_layers": True,
    "train.precision": "bf16",
    "train.matmul_precision": "high",
    "train.zero_stage": "auto",
    **dict.fromkeys(
        (
            "train.compile",
            "train.cast_weights_once",
            "train.fold_norms",
            "train.channels_last",
            "train.expandable_segments",
            "train.delay_results",
        ),
        True,
    ),
}
# Deformable DETR's presets: what they change in the published recipe, which the defaults of the config are as well.
DEFORMABLE: dict[str, dict[str, Any]] = {
    "r50_deformable": {},
    "r50_deformable_gpu": GPU,
    "r50_deformable_refine": REFINE,
    "r50_deformable_two_stage": TWO_STAGE,
    "r50_deformable_single_scale": {"model.levels": 1},
    "r50_deformable_single_scale_dc5": {"model.levels": 1, "model.backbone.dilation": True},
    "r50_deformable_single_scale_k1": {"model.levels": 1, **K1},
    "r50_deformable_k1": K1,
    "r50_deformable_own_level": {"model.cross_level": False},
    "r50_deformable_own_level_k1": {"model.cross_level": False, **K1},
    "r50_deformable_fpn": {"model.neck": "fpn"},
    "r50_deformable_bifpn": {"model.neck": "bifpn"},
    "r101_deformable": {"model.backbone.name": "resnet101"},
    "r101_deformable_two_stage": {**TWO_STAGE, "model.backbone.name": "resnet101"},
    "x101_deformable_two_stage": X101,
    "x101_dcn_deformable_two_stage": DCN,
    "x101_dcn_deformable_two_stage_tta": {
        **DCN,
        "evaluation.scales": (480, 640, 800, 1000),
        "evaluation.flip": True,
        "train.eval_epochs": 50,
        "train.checkpoint_steps": 118_287 // 32,
    },
}
# Trainable, with 91 classes. The first four are published; a ResNet-101 has 17 more blocks in layer3, and K = 1 takes
# three of four points from 12 attention modules, each point two offsets and a weight for each of 8 heads and 4 levels.
PARAMETERS = {
    "r50_deformable": 39_847_265,
    "r50_deformable_refine": 40_627_260,
    "r50_deformable_two_stage": 40_959_129,
    "r50_deformable_single_scale": 33_844_193,
    "r50_deformable_single_scale_dc5": 33_844_193,
    "r101_deformable": 39_847_265 + 17 * (1024 * 256 + 9 * 256 * 256 + 256 * 1024),
    "r50_deformable_k1": 39_847_265 - 12 * 3 * (2 + 1) * 8 * 4 * 257,
    "r50_deformable_single_scale_k1": 33_844_193 - 12 * 3 * (2 + 1) * 8 * 257,
    "r50_deformable_own_level": 39_847_265 - 6 * 4 * (2 + 1) * 8 * 3 * 257,  # no points on three of four levels
}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_files_open_with_the_published_figures(preset: str) -> None:
    """A comment with the AP of its row and the epochs; the same figures stand in `pipeline.presets.published`."""
    config = load_config(PRESETS[preset])
    assert config.name == preset
    lines = PRESETS[preset].read_text().splitlines()
    head = " ".join(line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert head
    row = find_published(preset)
    if row.table == "3":
        assert f"test-dev AP {row.ap_test_dev}" in head
    elif row.table:
        assert f"AP {row.ap or row.ap_code}" in head
    if row.table:
        assert f"{row.epochs} epochs" in head
        assert row.epochs == config.train.epochs
    else:
        assert "AP" in head or "No published figure" in head


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_figures_belong_to_a_preset_and_are_in_order(preset: str) -> None:
    assert preset in PRESETS
    row = find_published(preset)
    assert bool(row.table) == bool(row.row)
    figures = [value for name, value in asdict(row).items() if name.startswith("ap") and value is not None]
    assert all(1 < value < 100 for value in figures)  # percent
    for low, high in (("ap75", "ap50"), ("ap", "ap50"), ("ap_small", "ap_medium"), ("ap_medium", "ap_large")):
        below, above = getattr(row, low), getattr(row, high)
        assert below is None or above is None or below < above


@pytest.mark.parametrize("preset", DEFORMABLE)
def test_deformable_presets_are_the_published_recipe(preset: str) -> None:
    """The defaults are the recipe too, and base.yaml states it: neither may drift from the other."""
    assert flatten(load_config(PRESETS[preset])) == flatten(Config()) | {"name": preset} | DEFORMABLE[preset]


def test_deformable_presets_are_all_tested() -> None:
    assert DEFORMABLE.keys() == {name for name in PRESETS if "deformable" in name}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_describe_counts_parameters(preset: str) -> None:
    config = load_config(PRESETS[preset], ["model.num_classes=91"])
    with torch.device("meta"):
        model = build_model(config.model, load_backbone=False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PARAMETERS[preset]


def small(preset: str) -> Config:
    """The preset with a fraction of its width and depth."""
    config = load_config(PRESETS[preset])
    if config.model.num_classes == "auto":
        config = override(config, ["model.num_classes=5"])
    for setting in SMALLER:
        try:
            config = override(config, [setting])
        except ConfigError:
            assert setting != SMALLER[0]  # no preset may need a download here
    return config


def batch(stride: int, classes: int) -> Batch:
    """An image with three boxes and a smaller one without any."""
    torch.manual_seed(0)
    height = max(64, stride)
    images = torch.randint(0, 256, (2, 3, height, height + 32), dtype=torch.uint8)
    mask = torch.zeros(2, height, height + 32, dtype=torch.bool)
    mask[1, :, height:] = True
    images[1, :, :, height:] = 0
    return Batch(
        images=images,
        mask=mask,
        boxes_cxcywh=0.3 + 0.3 * torch.rand(3, 4),
        labels=torch.tensor([0, classes // 2, classes - 1]),
        target_offsets=torch.tensor([0, 3, 3]),
        image_ids=torch.tensor([1, 2]),
        sizes=torch.tensor([[height, height + 32], [2 * height, 2 * height]]),
        group=0,
        weight=1.0,
    )


def train_one_step(model: Detector, config: Config, images: Batch) -> None:
    """The engine's own step; every parameter is reached, so that no rank waits for another."""
    module = LossModule(model, build_criterion(config.loss))
    backend = PlainBackend(module, config.optim, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    result = Engine(module, backend, single(), seed=0).train_step([images], 0)
    assert result.applied
    assert result.losses["loss"] > 0
    assert all(torch.tensor(value).isfinite() for value in result.losses.values())
    trained = {name: p for name, p in model.named_parameters() if name in before}
    assert [name for name, p in trained.items() if p not in backend.optimizer.state] == []
    assert any(not torch.equal(p, before[name]) for name, p in trained.items())


@torch.no_grad()
def detect(model: Detector, images: Batch) -> list[dict[str, Tensor]]:
    images = images.to(torch.device("cpu"))
    return postprocess(model.eval()(images.images, images.mask), images.sizes)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_trains_a_step_and_detects(preset: str) -> None:
    torch.manual_seed(0)
    config = small(preset)
    model = build_model(config.model)
    images = batch(model.stride, config.model.num_classes)
    train_one_step(model, config, images)
    found = detect(model, images)
    assert len(found) == 2
    for image in found:
        assert len(image["scores"]) == len(image["labels"]) == len(image["boxes_xyxy"]) <= 100
        assert image["boxes_xyxy"].isfinite().all()
        assert ((image["scores"] >= 0) & (image["scores"] <= 1)).all()
        if config.model.class_head == "sigmoid":  # a softmax head's detections come in the order of the queries
            assert (image["scores"].diff() <= 0).all()
        assert ((image["labels"] >= 0) & (image["labels"] < config.model.num_classes)).all()
