"""`python -m benchmarks.plan`: planning an epoch at the paper's size, without any data.

It plans 118,287 images in 189 shards (COCO train2017), with sizes drawn like COCO's, for several batches and worlds up
to 4,096. Each row has processor time and peak memory of the plan with all views, and the share of padding. It also has
the balance of a step's ranks, the number of open shards, and the share of a shard that one rank reads. A second table
has the sizes of pad groups that one epoch contains, and the pixels more than without rounding, by `data.pad_multiple`.
"""

import argparse
import json
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.cli import CommandParser, Parser, main
from pipeline.config import AugmentConfig, DataConfig
from pipeline.data.plan import assign_groups, max_overlap, shard_uses, train_plan
from pipeline.data.transforms import draw_views

Ints = NDArray[np.int64]
SIDES = (640, 427, 480, 500, 375, 612, 333, 424, 426, 360)  # common sides of COCO, most frequent first
LANDSCAPE = 0.72  # share of COCO's images
MULTIPLES = (1, 32, 64, 128)  # of `data.pad_multiple`
SETUPS = (  # global batch, group, world, window
    *((32, 2, 16, 256), (32, 2, 16, 1024), (32, 4, 8, 256), (32, 4, 8, 1024)),
    *((256, 2, 64, 256), (256, 2, 64, 2048), (8192, 2, 4096, 256), (8192, 2, 4096, 65536)),
)


def coco_like(images: int) -> Ints:
    """Sizes (h, w): a longer side of mostly 640, a shorter one of a few usual values."""
    rng = np.random.default_rng(0)
    long = rng.choice([640, 500, 612], images, p=[0.85, 0.1, 0.05])
    frequency = np.geomspace(1, 0.1, len(SIDES))
    short = np.minimum(long, rng.choice(SIDES, images, p=frequency / frequency.sum()))
    wide = rng.random(images) < LANDSCAPE
    return np.where(wide[:, None], np.stack([short, long], 1), np.stack([long, short], 1)).astype(np.int64)


def measure(sizes: Ints, shards: Ints, setup: tuple[int, int, int, int], mix_shards: int) -> dict[str, Any]:
    """One row of the table."""
    global_batch, micro_batch, world, window = setup
    options: dict[str, Any] = {"digest": "0" * 64, "seed": 0, "epoch": 0, "mix_shards": mix_shards, "tail": "drop"}
    options |= {"micro_batch": micro_batch, "global_batch": global_batch, "window": window}
    start = time.process_time()
    views = draw_views(sizes, 0, 0, AugmentConfig())
    plan = train_plan(views.out_size, shards, **options)
    seconds = time.process_time() - start
    tracemalloc.start()  # slows down, so apart from the time
    train_plan(draw_views(sizes, 0, 0, AugmentConfig()).out_size, shards, **options)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    seen = views.out_size[plan]
    padded = micro_batch * seen.max(axis=2).prod(axis=-1)
    turns = [assign_groups(plan.shape[1], rank, world) for rank in range(world)]
    load = np.stack([padded[:, [turn.group for turn in mine if turn.weight]].sum(axis=1) for mine in turns], axis=1)
    mine = plan[:, [turn.group for turn in turns[0]]].reshape(len(plan), -1)
    read = shard_uses(np.repeat(np.arange(len(plan)), global_batch), shards[plan].ravel())
    return {
        "global_batch": global_batch,
        "group": micro_batch,
        "world": world,
        "window": window,
        "steps": len(plan),
        "cpu_s": round(seconds, 3),
        "peak_mib": round(peak, 1),
        "padding": round(float(1 - seen.prod(axis=-1).sum() / padded.sum()), 4),
        "mean_over_slowest_rank": round(float((load.mean(axis=1) / load.max(axis=1)).mean()), 3),
        "max_open_shards": max_overlap(read),
        "reads_per_shard_and_rank": round(mine.size / len(np.unique(shards[mine])), 1),
    }


def count_sizes(sizes: Ints, shards: Ints, mix_shards: int) -> list[dict[str, Any]]:
    """The different sizes of padded groups in the recipe's first epoch, for each rounding."""
    views = draw_views(sizes, 0, 0, AugmentConfig())
    plan = train_plan(
        views.out_size,
        shards,
        digest="0" * 64,
        seed=0,
        epoch=0,
        micro_batch=2,
        global_batch=32,
        mix_shards=mix_shards,
        window=256,
        tail="drop",
    )
    sides = views.out_size[plan].max(axis=2).reshape(-1, 2)
    rounded = {multiple: -(-sides // multiple) * multiple for multiple in MULTIPLES}
    pixels = {multiple: int(each.prod(axis=1).sum()) for multiple, each in rounded.items()}
    return [
        {
            "pad_multiple": multiple,
            "sizes": len(np.unique(each, axis=0)),
            "more_pixels": round(pixels[multiple] / pixels[1] - 1, 4),
        }
        for multiple, each in rounded.items()
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    """As Markdown."""
    print(f"| {' | '.join(rows[0]).replace('_', ' ')} |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.plan", __doc__.splitlines()[0], "python -m benchmarks.plan --mix-shards 8")
    parser.add_argument("--images", type=int, default=118_287, help="default %(default)s")
    parser.add_argument("--shards", type=int, default=189, help="default %(default)s")
    parser.add_argument("--mix-shards", type=int, default=DataConfig().mix_shards, help="default %(default)s")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    sizes, shards = coco_like(args.images), np.arange(args.images) * args.shards // args.images
    rows = [measure(sizes, shards, setup, args.mix_shards) for setup in SETUPS]
    print(f"{args.images:,} images in {args.shards} shards, {args.mix_shards} of them mixed\n")
    print_table(rows)
    print()
    rounded = count_sizes(sizes, shards, args.mix_shards)
    print_table(rounded)
    if args.json:
        results = {"plans": rows, "sizes": rounded}
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
