"""`python -m benchmarks.scaling`: a model on paper of many GPUs, from the measured step of one.

A step is `passes` pad groups on each rank, then one reduction of all gradients. Bytes are those that one rank sends.
Ring all-reduce sends 2(n-1)/n of the gradient, reduce-scatter or all-gather (n-1)/n. DeepSpeed 0.19 reduces by
all-reduce at every ZeRO stage, and a rank keeps its slice. It gathers the updated weights at stages 1 and 2, and at
stage 2 it reduces in every pass. On GPUs stages 1 and 2 reduce in buckets of 25 MiB: each while backward fills the next
one, the last one after it. Stage 0 reduces after backward. Within a node the ring runs over NVLink; across nodes each
node's network link carries it once. Ranks wait for the slowest (its share of pixels is taken from `benchmarks.plan`)
and for idle passes.

Not in the model: the wait for data, evaluation, the optimizer's own time, congestion, failures.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plan import coco_like, measure
from jobs.cli import CommandParser, Parser, main
from pipeline.config import DataConfig, TrainConfig
from pipeline.engine.batching import BatchArithmetic
from pipeline.errors import ConfigError

PARAMETERS = 39_844_438  # trainable ones of r50_deformable
FROZEN = 222_400 + 106_240  # numbers of its frozen stem and norms, which only a checkpoint holds
BACKWARD = 2 / 3  # share of a pass, behind which a reduction can hide
BUCKET_BYTES = 25 * 2**20  # bytes of gradients that are reduced at a time, as `pipeline.engine.zero` asks for
HOP = 5e-6  # seconds of latency per hop of the ring
NODE = 8  # GPUs
NVLINK = 200.0  # GB/s that a ring gets on an NVLink node
IMAGES, SHARDS = 118_287, 189  # of COCO train2017


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one optimizer step."""

    reduced: float  # gradients, beside the backward passes if they overlap
    gathered: float  # weights, after the update: nothing to hide behind

    @property
    def total(self) -> float:
        """Both."""
        return self.reduced + self.gathered


def traffic(stage: int, world: int, passes: int, gradient: float) -> Traffic:
    """Of ZeRO 0, 1 or 2; `gradient` is the bytes of all gradients, and weights have as many (fp32)."""
    once = (world - 1) / world * gradient
    return Traffic(2 * once * (passes if stage == 2 else 1), once if stage else 0.0)


@dataclass(frozen=True)
class Setting:
    """What is carried to other world sizes."""

    pass_seconds: float  # forward and backward of one pad group on one GPU
    gradient: float = 4.0 * PARAMETERS  # bytes
    micro_batch: int = 2
    stage: int = 1

    def seconds(self, arithmetic: BatchArithmetic, evenness: float, gbit: float, overlap: bool) -> float:
        """One optimizer step; `evenness` is the mean rank's work over the slowest's, `gbit` a node's network."""
        work = arithmetic.passes * self.pass_seconds / evenness
        sent = traffic(self.stage, arithmetic.world, arithmetic.passes, self.gradient)
        speed = bandwidth(arithmetic.world, gbit)
        hops = HOP * 2 * (arithmetic.world - 1)
        passes = self.reducing_passes(arithmetic)
        buckets = self.buckets if overlap else 1
        one = sent.reduced / speed / passes / buckets + hops
        late = max(0.0, one - BACKWARD * self.pass_seconds / buckets)  # than the gradients of the next bucket
        reduction = passes * (one + (buckets - 1) * late)
        return work + reduction + sent.gathered / speed + hops / 2 * bool(self.stage)

    def efficiency(self, arithmetic: BatchArithmetic, evenness: float, gbit: float, overlap: bool) -> float:
        """Images per second and GPU, over those of one GPU."""
        useful = arithmetic.groups / arithmetic.world * self.pass_seconds
        return useful / self.seconds(arithmetic, evenness, gbit, overlap)

    @property
    def buckets(self) -> int:
        """Reductions of a pass whose gradients are reduced during backward; one, after it, without ZeRO."""
        return math.ceil(self.gradient / BUCKET_BYTES) if self.stage else 1

    def reducing_passes(self, arithmetic: BatchArithmetic) -> int:
        """Passes of a step that end with reduced gradients: all at stage 2, else the last one."""
        return arithmetic.passes if self.stage == 2 else 1

    def bandwidth_to_hide(self, arithmetic: BatchArithmetic) -> float:
        """Gb/s of each node's network (of NVLink on one node) at which all buckets but the last cost no time."""
        sent = traffic(self.stage, arithmetic.world, arithmetic.passes, self.gradient).reduced
        return 8e-9 * sent / (BACKWARD * self.pass_seconds * self.reducing_passes(arithmetic))


def bandwidth(world: int, gbit: float) -> float:
    """Bytes per second of the slowest link of a ring over `world` GPUs."""
    return NVLINK * 1e9 if world <= NODE else min(NVLINK * 1e9, gbit * 1e9 / 8)


def checkpoint_bytes(average: bool) -> int:
    """Weights and two moments in fp32, and an average of the weights if there is one; at any world size."""
    return 4 * (PARAMETERS + FROZEN) * (1 + average) + 8 * PARAMETERS


@cache
def evenness(global_batch: int, micro_batch: int, world: int, window: int) -> float:
    """Mean over slowest rank of a step, by padded pixels (`benchmarks.plan`), apart from the passes that are idle."""
    shards = np.arange(IMAGES) * SHARDS // IMAGES
    row = measure(coco_like(IMAGES), shards, (global_batch, micro_batch, world, window), DataConfig().mix_shards)
    arithmetic = BatchArithmetic(global_batch, micro_batch, world)
    return min(1.0, float(row["mean_over_slowest_rank"]) * arithmetic.passes * world / arithmetic.groups)


def measured_pass(path: Path, otherwise: str = "--pass-seconds") -> float:
    """Seconds of the fastest training step in a file of `benchmarks.gpu` (two images, a pad group)."""
    try:
        return float(min(step["ms"] for step in json.loads(path.read_text(encoding="utf-8"))["steps"])) / 1e3
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} has no training step of benchmarks.gpu ({error!r}); give {otherwise}") from None


def rows_of(setting: Setting, worlds: list[int], recipe: int, networks: list[float]) -> list[dict[str, Any]]:
    """One row per world size. The global batch is the recipe's as long as each rank has its own pad group."""
    rows = []
    for world in worlds:
        batch = max(recipe, world * setting.micro_batch)
        arithmetic = BatchArithmetic(batch, setting.micro_batch, world)
        even = evenness(batch, setting.micro_batch, world, max(DataConfig().window, 8 * batch))
        sent = [traffic(stage, world, arithmetic.passes, setting.gradient) for stage in (0, 1, 2)]
        row: dict[str, Any] = {
            "gpus": world,
            "global_batch": batch,
            "passes": arithmetic.passes,
            "mean_over_slowest": round(even, 3),
        }
        row |= {f"zero_{stage}_mb": round(each.total / 1e6) for stage, each in enumerate(sent)}
        row["gbit_to_hide"] = round(setting.bandwidth_to_hide(arithmetic), 1)
        for gbit in networks if world > NODE else networks[:1]:
            both = [setting.efficiency(arithmetic, even, gbit, overlap) for overlap in (False, True)]
            row[f"at_{gbit:g}"] = [round(each, 3) for each in both]
        rows.append(row)
    return rows


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser(
        "benchmarks.scaling", __doc__.splitlines()[0], "python -m benchmarks.scaling --pass-seconds 0.4"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pass-seconds", type=float, help="forward and backward of one pad group on one GPU")
    source.add_argument("--measured", type=Path, metavar="JSON", help="take it from a result file of benchmarks.gpu")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2), default=TrainConfig().zero_stage, help="%(default)s")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], help="default %(default)s")
    parser.add_argument("--global-batch", type=int, default=32, help="the recipe's; default %(default)s")
    parser.add_argument("--network", type=float, nargs="+", default=[100, 200, 400], help="Gb/s per node")
    parser.add_argument("--storage", type=float, default=1.0, help="GB/s that one node writes; default %(default)s")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compute, print, save."""
    seconds = measured_pass(args.measured) if args.measured else args.pass_seconds
    if not seconds or seconds <= 0 or min(args.gpus) < 1 or min(args.network) <= 0:
        raise ConfigError("give the seconds of one pass: --pass-seconds 0.1, or --measured of benchmarks.gpu's file")
    setting = Setting(seconds, stage=args.zero)
    rows = rows_of(setting, args.gpus, args.global_batch, args.network)
    print(f"{asdict(setting)}; efficiency without and with overlap, at Gb/s per node of {NODE} GPUs\n")
    names = [*rows[0], *(f"at_{gbit:g}" for gbit in args.network if f"at_{gbit:g}" not in rows[0])]
    print(f"| {' | '.join(name.replace('_', ' ') for name in names)} |")
    print("|---" * len(names) + "|")
    for row in rows:
        print(f"| {' | '.join(_cell(row.get(name, 'NVLink')) for name in names)} |")
    size = checkpoint_bytes(average=False)
    print(f"\ncheckpoint: {size / 1e6:.0f} MB, {size / 1e9 / args.storage:.1f} s at {args.storage:g} GB/s, by one rank")
    if args.json:
        args.json.write_text(
            json.dumps({"setting": asdict(setting), "rows": rows, "checkpoint": size}, indent=1) + "\n",
            encoding="utf-8",
        )
    return 0


def _cell(value: Any) -> str:
    return " / ".join(f"{each:.0%}" for each in value) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
