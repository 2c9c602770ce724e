"""Pack a COCO-format data set into shards, verify a shard folder, describe it, compare two.

`build` leaves nothing half-written and continues a build that was stopped; `verify` and `diff` exit 1 if they find
faults or differences. The work is in `pipeline.data.sharding`: `shards`, `verify`, `summary`, `diff`.
"""

import argparse
import sys

from jobs.cli import CommandParser, Parser, main
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.sharding.diff import diff_shards
from pipeline.data.sharding.orientation import EXIF
from pipeline.data.sharding.shards import SAMPLES_PER_SHARD, build_shards
from pipeline.data.sharding.summary import load_summary
from pipeline.data.sharding.verify import verify_shards
from pipeline.errors import ConfigError

PATHS = {"build": ("ANNOTATIONS", "IMAGES", "OUT"), "verify": ("OUT",), "info": ("OUT",), "diff": ("A", "B")}
FLAGS = {"build": ("workers", "samples_per_shard", "mib_per_shard", "limit", "exif"), "verify": ("workers",)}


def build_parser() -> Parser:
    """The command line of `python -m jobs.shard`."""
    forms = "\n".join(f"  {action:7}{' '.join(paths)}" for action, paths in PATHS.items())
    parser = CommandParser(
        "jobs.shard",
        f"{__doc__.splitlines()[0]}\n\n{forms}\n\n"
        "ANNOTATIONS is COCO JSON; IMAGES a folder, a zip, a tar or a folder of tars; a shard folder (OUT, A, B)\n"
        "a folder or an fsspec URL such as s3://bucket/train. Check ANNOTATIONS with `python -m jobs.lint` first.",
        "python -m jobs.shard build annotations/instances_train2017.json train2017 shards/train2017 --workers 8",
    )
    parser.add_argument("action", choices=PATHS)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="as above")
    parser.add_argument("--workers", type=int, help="build, verify: parallel shards (1), as Ray tasks if more than 1")
    parser.add_argument("--samples-per-shard", type=int, help=f"build: images per tar ({SAMPLES_PER_SHARD})")
    parser.add_argument("--mib-per-shard", type=int, help="build: maximum size of a tar instead, in MiB")
    parser.add_argument("--limit", type=int, help="build: only the first N images by id")
    parser.add_argument("--exif", choices=EXIF, help="build: apply EXIF orientations to images (auto: by their size)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the action; returns 1 if verify or diff found something, else 0."""
    names = PATHS[args.action]
    if len(args.paths) != len(names):
        raise ConfigError(f"jobs.shard {args.action} takes {' '.join(names)}; got {len(args.paths)} paths")
    flags = {name: value for name in FLAGS["build"] if (value := getattr(args, name)) is not None}
    for name in flags.keys() - set(FLAGS.get(args.action, ())):
        raise ConfigError(f"jobs.shard {args.action} does not take --{name.replace('_', '-')}")
    if {"samples_per_shard", "mib_per_shard"} <= flags.keys():
        raise ConfigError("--samples-per-shard and --mib-per-shard exclude each other")
    if args.action == "build":
        try:
            return _show(build_shards(*args.paths, **flags))
        except KeyboardInterrupt:
            print(f"finished shards are kept in {args.paths[2]}; run the same command again", file=sys.stderr)
            raise
    if args.action == "info":
        index = load_index(args.paths[0])
        _show(index)
        for shard in index.shards:
            print(f"{shard.name}  {shard.samples:,} images  {shard.bytes:,} bytes  sha256 {shard.sha256[:16]}")
        return 0
    found = verify_shards(*args.paths, **flags) if args.action == "verify" else diff_shards(*args.paths)
    for line in found:
        print(f"error: {line}" if args.action == "verify" else line)
    if not found:
        print(f"{args.paths[0]} is sound" if args.action == "verify" else "the same bytes in the same order")
    return 1 if found else 0


def _show(index: ShardIndex) -> int:
    print("\n".join(load_summary(index).table(index)))
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
