"""`python -m benchmarks.cost`: hours and cost of the paper's rows on one GPU and on many, from the time of one pass.

The pass is forward and backward of two images of r50_deformable: measured (`--measured`, a result of
`benchmarks.gpu`), or assumed (`--pass-ms`). Other rows take longer by their multiply-adds (`python -m jobs.table`), an
epoch is COCO's 118,287 images, and what many GPUs lose is that of `benchmarks.scaling`. The price of a GPU hour is an
input. Not in it: evaluation, start, failures.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling import IMAGES, Setting, evenness, measured_pass
from jobs.cli import CommandParser, Parser, main
from jobs.table import CONFIGS
from pipeline.config import Config, DataConfig
from pipeline.engine.batching import BatchArithmetic
from pipeline.errors import ConfigError
from pipeline.presets.rows import find_presets, select

BASE = "r50_deformable"
TABLE = Path(__file__).parent / "results" / "2026-11-24_table.json"  # multiply-adds of all presets
MICRO_BATCH = 2  # images of a pass
HOUR = 3600.0


def training_hours(config: Config, pass_seconds: float, trainable: int, world: int, gbit: float) -> float:
    """Hours of a preset's whole training on `world` GPUs.

    Args:
        config: the preset's; its global batch grows where each GPU would not have two images.
        pass_seconds: forward and backward of two images.
        trainable: numbers whose gradients are summed over the GPUs.
        world: GPUs, 8 in a node.
        gbit: Gb/s of a node's network.
    """
    alone = config.train.epochs * IMAGES / MICRO_BATCH * pass_seconds / HOUR
    if world == 1:
        return alone
    batch = max(config.train.global_batch, world * MICRO_BATCH)
    arithmetic = BatchArithmetic(batch, MICRO_BATCH, world)
    even = evenness(batch, MICRO_BATCH, world, max(DataConfig().window, 8 * batch))
    setting = Setting(pass_seconds, gradient=4.0 * trainable, micro_batch=MICRO_BATCH, stage=0)
    return alone / world / setting.efficiency(arithmetic, even, gbit, overlap=False)


def rows_of(
    presets: Mapping[str, Config], pass_seconds: float, gpus: Sequence[int], gbit: float
) -> Iterator[dict[str, Any]]:
    """A row per preset that stands in the paper's tables; more views of an evaluation need no training of their own."""
    table = {row["preset"]: row for row in json.loads(TABLE.read_text(encoding="utf-8"))}
    for name, config in presets.items():
        if name not in table or not table[name]["published"]["table"] or name.endswith("_tta"):
            continue
        work = table[name]["gflops"] / table[BASE]["gflops"]
        hours = {n: training_hours(config, work * pass_seconds, table[name]["trainable"], n, gbit) for n in gpus}
        yield {"preset": name, "epochs": config.train.epochs, "work": work, "hours": hours}


def build_parser() -> Parser:
    """The command line."""
    name = "benchmarks.cost"
    parser = CommandParser(name, __doc__.splitlines()[0], f"python -m {name} r50_deformable --pass-ms 25 --gpu-hour 3")
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="these alone (default: all)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pass-ms", type=float, help="forward and backward of two images of r50_deformable")
    source.add_argument("--measured", type=Path, metavar="JSON", help="take it from a result file of benchmarks.gpu")
    parser.add_argument("--gpu-hour", type=float, required=True, help="price of one GPU for an hour, in any currency")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], help="default %(default)s")
    parser.add_argument("--network", type=float, default=200, help="Gb/s per node of 8 GPUs; default %(default)s")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compute and print."""
    seconds = measured_pass(args.measured, "--pass-ms") if args.measured else args.pass_ms / 1e3
    if not (seconds > 0 and args.gpu_hour >= 0 and min(args.gpus) > 0 and args.network > 0):
        raise ConfigError("--pass-ms, --gpus and --network must be above 0, --gpu-hour not below it")
    chosen = select(find_presets(CONFIGS), args.presets)
    source = f"of {args.measured}" if args.measured else "assumed"
    print(f"a pass of two images takes {1e3 * seconds:.1f} ms ({source}), a GPU hour costs {args.gpu_hour:g}\n")
    many = " / ".join(str(number) for number in args.gpus)
    print(f"| preset | epochs | work | hours on {many} GPUs | cost on {many} GPUs |\n|---|---|---|---|---|")
    for row in rows_of(chosen, seconds, args.gpus, args.network):
        hours = " / ".join(f"{each:.2g}" if each < 10 else f"{each:.0f}" for each in row["hours"].values())
        costs = " / ".join(f"{number * each * args.gpu_hour:.0f}" for number, each in row["hours"].items())
        print(f"| {row['preset']} | {row['epochs']} | {row['work']:.2f} | {hours} | {costs} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
