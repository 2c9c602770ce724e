"""Pack a COCO-format data set into shards, prove a shard folder, describe it, compare two.

`build` leaves nothing half-written and continues a build that was stopped; `verify` and `diff` exit 1 if they find
something. The work is in `pipeline.data.shards` and `pipeline.data.verify`.
"""

import argparse
import sys

from jobs.cli import CommandParser, Parser, main
from pipeline.data.index import load_index
from pipeline.data.shards import SAMPLES_PER_SHARD, build_shards
from pipeline.data.verify import describe, diff_shards, verify_shards
from pipeline.errors import ConfigError

PATHS = {"build": ("ANNOTATIONS", "IMAGES", "OUT"), "verify": ("OUT",), "info": ("OUT",), "diff": ("A", "B")}


def build_parser() -> Parser:
    """The command line of `python -m jobs.shard`."""
    forms = "\n".join(f"  {action:7}{' '.join(paths)}" for action, paths in PATHS.items())
    parser = CommandParser(
        "jobs.shard",
        f"{__doc__.splitlines()[0]}\n\n{forms}",
        "python -m jobs.shard build annotations/instances_train2017.json train2017 shards/train2017 --workers 8",
    )
    parser.add_argument("action", choices=PATHS)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="see above; a shard folder may also be a URL to read")
    parser.add_argument("--workers", type=int, default=1, help="shards written at a time, as Ray tasks if more than 1")
    parser.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help="default %(default)s")
    parser.add_argument("--limit", type=int, help="only the first N images by id")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do the action; 0, or 1 if verify or diff found something."""
    names = PATHS[args.action]
    if len(args.paths) != len(names):
        raise ConfigError(f"jobs.shard {args.action} takes {' '.join(names)}; got {len(args.paths)} paths")
    if args.action == "build":
        index = build_shards(
            *args.paths, samples_per_shard=args.samples_per_shard, workers=args.workers, limit=args.limit
        )
        print("\n".join(describe(index)))
        return 0
    if args.action == "info":
        index = load_index(args.paths[0])
        print("\n".join(describe(index)))
        print("names       " + ", ".join(f"{category.name} ({category.id})" for category in index.categories))
        for shard in index.shards:
            print(f"{shard.name}  {shard.samples:,} images  {shard.bytes:,} bytes  sha256 {shard.sha256[:16]}")
        return 0
    found = verify_shards(*args.paths) if args.action == "verify" else diff_shards(*args.paths)
    for fault in found:
        print(fault)
    if not found:
        print(f"{args.paths[0]} is proven" if args.action == "verify" else "the same bytes in the same order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
