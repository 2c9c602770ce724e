"""`python -m benchmarks.step_counts`: the training step before and after the settings of r50_deformable_gpu, on a CPU.

It prints launches and waits of a bf16 step (`benchmarks.launches`) with plain PyTorch and through DeepSpeed, how far
the losses of two steps move with each setting, and the sizes of pad groups in an epoch like COCO's (`benchmarks.plan`).
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.launches import CONFIGS, SIZE, build_engine, count
from benchmarks.model import random_batch
from benchmarks.plan import coco_like, count_sizes
from jobs.cli import CommandParser, Parser, main
from pipeline.config import Config, DataConfig, load_config
from pipeline.files.atomic import write_file

BEFORE, AFTER = "r50_deformable", "r50_deformable_gpu"
LIGHT = ("model.backbone.weights=none", "train.compile=false")
CAST, MERGE, FOLD = "train.cast_weights_once=true", "model.merge_layers=true", "train.fold_norms=true"
IMAGES, SHARDS = 118_287, 189  # of COCO train2017
STEPS = 2  # whose losses are compared


@dataclass(frozen=True)
class Counted:
    """A row of launches and waits."""

    preset: str
    settings: tuple[str, ...] = ()
    deepspeed: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        return " ".join((self.preset, *self.settings, *(["through DeepSpeed"] if self.deepspeed else [])))


COUNTED = (
    Counted(BEFORE),
    Counted(BEFORE, ("train.zero_stage=0",), deepspeed=True),
    Counted(BEFORE, ("train.zero_stage=1",), deepspeed=True),
    Counted(BEFORE, (CAST,)),
    Counted(BEFORE, (CAST, MERGE)),
    Counted(BEFORE, (CAST, MERGE, FOLD)),
    Counted(AFTER),
    Counted(AFTER, deepspeed=True),
)
COMPARED = (  # a setting, and the precision in which it is compared
    (CAST, "bf16"),
    (MERGE, "fp32"),
    (FOLD, "fp32"),
    ("train.channels_last=true", "fp32"),
    ("train.delay_results=true", "fp32"),
)


def config_of(preset: str, *settings: str) -> Config:
    """The preset with random weights, not compiled."""
    return load_config(CONFIGS / f"{preset}.yaml", [*LIGHT, *settings])


def size_rows() -> dict[str, dict[str, Any]]:
    """Sizes of pad groups in an epoch and the pixels more, by `data.pad_multiple`."""
    shards = np.arange(IMAGES) * SHARDS // IMAGES
    rows = count_sizes(coco_like(IMAGES), shards, DataConfig().mix_shards)
    return {str(row["pad_multiple"]): {"sizes": row["sizes"], "more_pixels": row["more_pixels"]} for row in rows}


def count_row(row: Counted) -> dict[str, Any]:
    """Launches and waits of one step of one pad group."""
    config = config_of(row.preset, "train.precision=bf16", *row.settings)
    launches, waits = count(build_engine(config, row.deepspeed), [random_batch(config.train.pad_group, *SIZE)])
    return {"launches": launches.counts.total(), "waits": waits.counts.total()}


@cache
def losses_of(precision: str, *settings: str) -> list[float]:
    """The total losses of the first steps of plain PyTorch."""
    engine = build_engine(config_of(BEFORE, f"train.precision={precision}", "train.zero_stage=auto", *settings))
    return [engine.train_step([random_batch(2, *SIZE)], step).losses["loss"] for step in range(STEPS)]


def compare(setting: str, precision: str) -> dict[str, Any]:
    """The largest relative change of a loss by one setting alone."""
    pairs = zip(losses_of(precision), losses_of(precision, setting), strict=True)
    return {"precision": precision, "loss_changes_by": float(f"{max(abs(b / a - 1) for a, b in pairs):.1e}")}


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """As Markdown."""
    print(f"| {' | '.join(rows[0]).replace('_', ' ')} |\n{'|---' * len(rows[0])}|")
    for row in rows:
        print(f"| {' | '.join(f'{v:,}' if isinstance(v, int) else str(v) for v in row.values())} |")
    print(flush=True)


def build_parser() -> Parser:
    """The command line."""
    name = "benchmarks.step_counts"
    parser = CommandParser(name, __doc__.splitlines()[0], f"python -m {name} --json counts.json")
    parser.add_argument(
        "--json", type=Path, help="keep the results in this file; rows that it has are not counted again"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Count, compare, print, save."""
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
    }
    if args.json and args.json.exists():
        results = json.loads(args.json.read_text(encoding="utf-8"))
    parts: dict[str, dict[str, Callable[[], Any]]] = {
        "sizes": {"all": size_rows},
        "steps": {row.name: partial(count_row, row) for row in COUNTED},
        "losses": {setting: partial(compare, setting, precision) for setting, precision in COMPARED},
    }
    for part, rows in parts.items():
        found = results.setdefault(part, {})
        for name, function in rows.items():
            found[name] = found[name] if name in found else function()
            if args.json:
                write_file(args.json, (json.dumps(results, indent=1) + "\n").encode())  # a kill leaves the file whole
    print_rows([{"multiple": multiple, **row} for multiple, row in results["sizes"]["all"].items()])
    print_rows([{"step": name, **row} for name, row in results["steps"].items()])
    print_rows([{"setting": name, **row} for name, row in results["losses"].items()])
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
