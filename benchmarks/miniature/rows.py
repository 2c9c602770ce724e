"""The rows of the miniature: which settings differ from `base.yaml`, the row of the paper, and the paper's claims.

Every row has the same data, steps, backbone, optimiser and losses. What differs is named here and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.miniature.pretraining import Pretraining, pretrain_backbone
from benchmarks.miniature.training import BASE, Drawn, draw_data
from pipeline.config import Config, load_config

DATA = Drawn(train=500, val=200, side=96)
PRETRAINING = Pretraining(images=2000, side=96, epochs=3)
SEEDS = (0, 1, 2)
LONGER = 10  # times as many epochs
EPOCHS, DROP = 6, 5  # of base.yaml


def places(folder: str) -> dict[str, str]:
    """Settings that name the shards and the backbone's weights in `folder`."""
    return {
        "data.train": f"{folder}/train",
        "data.val": f"{folder}/val",
        "model.backbone.weights": f"{folder}/{PRETRAINING.file}",
    }


def prepare(folder: Path) -> dict[str, str]:
    """Draw the data and train the backbone where they are missing; returns the digest of each."""
    backbone = load_config(BASE).model.backbone
    return {**draw_data(DATA, folder), "backbone": pretrain_backbone(backbone, PRETRAINING, folder)}


@dataclass(frozen=True)
class Row:
    """A detector with its schedule."""

    name: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # over those of base.yaml
    preset: str = ""  # of the paper's row

    def config(self, seed: int, folder: str = "") -> Config:
        """The config of one unit.

        Args:
            seed: of the run.
            folder: with what all rows start from, see `places`.
        """
        return load_config(BASE, {**self.settings, **(places(folder) if folder else {}), "seed": seed})


@dataclass(frozen=True)
class Claim:
    """The paper says that `better` has a higher AP than `worse`; difference in percent of AP, as printed."""

    text: str
    better: str
    worse: str
    paper: float | None  # None: the paper shows it without a number
    metric: str = "AP"
    nothing: bool = False  # the paper says that there is no difference


@dataclass(frozen=True)
class Group:
    """A question with its rows."""

    title: str
    rows: tuple[str, ...]
    claims: tuple[Claim, ...]


def _detr(epochs: int) -> dict[str, Any]:
    """DETR at `epochs`: the losses of Deformable DETR (the paper's DETR-DC5+) and evaluations as often as there.

    At the rate of the other rows, and without a trained backbone, its AP was 0.0 after 60 epochs. At this one it rises,
    slowly; Deformable DETR has half of its AP at it (epoch 4). The published rates differ in the same direction.
    """
    return {
        "model.name": "detr",
        "optim.lr": 3e-4,
        "optim.backbone_lr": 1e-4,
        "model.levels": 4,  # the default: DETR reads no levels, and the config refuses them
        "train.epochs": epochs,
        "optim.drop_epochs": [epochs * DROP // EPOCHS],
        "train.eval_epochs": 2 * max(1, epochs // EPOCHS // 2),
    }


def _points(encoder_and_decoder: int) -> dict[str, Any]:
    return {"model.enc_points": encoder_and_decoder, "model.dec_points": encoder_and_decoder}


_OWN_LEVEL = {"model.cross_level": False}
ROWS = {
    row.name: row
    for row in (
        Row("detr", "DETR", _detr(EPOCHS), "r50_detr_dc5_plus"),
        Row("detr_10x", f"DETR, {LONGER} times as many epochs", _detr(LONGER * EPOCHS), "r50_detr"),
        Row("deformable", "Deformable DETR: multi-scale attention, K = 4", preset="r50_deformable"),
        Row("single_scale_k1", "one scale, K = 1", {"model.levels": 1, **_points(1)}, "r50_deformable_single_scale_k1"),
        Row(
            "own_level_k1",
            "multi-scale inputs without multi-scale attention, K = 1",
            {**_OWN_LEVEL, **_points(1)},
            "r50_deformable_own_level_k1",
        ),
        Row(
            "own_level_k4",
            "multi-scale inputs without multi-scale attention, K = 4",
            _OWN_LEVEL,
            "r50_deformable_own_level",
        ),
        Row("fpn", "multi-scale attention, K = 4, FPN", {"model.neck": "fpn"}, "r50_deformable_fpn"),
        Row("bifpn", "multi-scale attention, K = 4, BiFPN", {"model.neck": "bifpn"}, "r50_deformable_bifpn"),
        Row("refine", "with iterative box refinement", {"model.refine": True}, "r50_deformable_refine"),
        Row(
            "two_stage",
            "with refinement and two stages",
            {"model.refine": True, "model.two_stage": True},
            "r50_deformable_two_stage",
        ),
        Row("drop_3", "learning rate drops after epoch 3", {"optim.drop_epochs": [3]}),
        Row("no_drop", "learning rate does not drop", {"optim.drop_epochs": [EPOCHS]}),
    )
}
GROUPS = {
    "a": Group(
        "Convergence (Table 1, Figure 2)",
        ("detr", "single_scale_k1", "deformable", "detr_10x"),
        (
            Claim("Deformable DETR is better than DETR at equal epochs", "deformable", "detr", 7.6),
            Claim("the same for small objects", "deformable", "detr", 10.1, "AP_small"),
            Claim(f"it is better than DETR with {LONGER} times as many epochs", "deformable", "detr_10x", 1.8),
            Claim("the same for small objects", "deformable", "detr_10x", 5.9, "AP_small"),
            Claim("on one map as DETR, with K = 1, it is better at equal epochs", "single_scale_k1", "detr", None),
        ),
    ),
    "b": Group(
        "Scales and points (Table 2)",
        ("single_scale_k1", "own_level_k1", "own_level_k4", "deformable", "fpn", "bifpn"),
        (
            Claim("multi-scale inputs help", "own_level_k1", "single_scale_k1", 1.7),
            Claim("the same for small objects", "own_level_k1", "single_scale_k1", 2.9, "AP_small"),
            Claim("K = 4 is better than K = 1", "own_level_k4", "own_level_k1", 0.9),
            Claim("multi-scale attention helps", "deformable", "own_level_k4", 1.5),
            Claim("an FPN adds nothing", "fpn", "deformable", 0.0, nothing=True),
            Claim("a BiFPN adds nothing", "bifpn", "deformable", 0.1, nothing=True),
        ),
    ),
    "c": Group(
        "Refinement and two stages (Table 1)",
        ("deformable", "refine", "two_stage"),
        (
            Claim("iterative box refinement helps", "refine", "deformable", 1.6),
            Claim("two stages help further", "two_stage", "refine", 0.8),
        ),
    ),
    "d": Group(
        "Drop of the learning rate (Figure 2)",
        ("deformable", "drop_3", "no_drop"),
        (Claim("AP leaps where the learning rate drops", "deformable", "no_drop", None),),
    ),
}


def units(groups: list[str]) -> list[tuple[Row, int]]:
    """The trainings of these groups, each once: group by group, and in a group a seed of all rows before the next."""
    wanted = dict.fromkeys((name, seed) for group in groups for seed in SEEDS for name in GROUPS[group].rows)
    return [(ROWS[name], seed) for name, seed in wanted]
