"""Pack a data set into shards, verify a shard folder, describe it, compare two.

DATASET is a folder, zip or tar of COCO JSON, YOLO, Pascal VOC or LabelMe files with their images; each split becomes
a folder of OUT. ANNOTATIONS is COCO JSON; IMAGES a folder, a zip, a tar or a folder of tars; a shard folder (OUT, A, B)
a folder or an fsspec URL such as s3://bucket/train. `python -m jobs.lint` checks the data first. A stopped build
continues with the same command. `verify` and `diff` exit 1 if they find faults or differences.
"""

import argparse
import sys

from jobs.cli import CommandParser, Parser, main
from jobs.dataset_arguments import NAMES, SIZES, add_dataset_arguments, build
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.sharding.diff import diff_shards
from pipeline.data.sharding.orientation import EXIF
from pipeline.data.sharding.shards import SAMPLES_PER_SHARD
from pipeline.data.sharding.summary import load_summary
from pipeline.data.sharding.verify import verify_shards
from pipeline.errors import ConfigError

FORMS = {"build": ("DATASET OUT", "ANNOTATIONS IMAGES OUT"), "verify": ("OUT",), "info": ("OUT",), "diff": ("A B",)}
FLAGS = {"build": (*SIZES, "limit", "exif", *NAMES), "verify": ("workers",)}
EXAMPLE = """python -m jobs.shard build export.zip shards --drop-unused
  python -m jobs.shard build annotations/instances_train2017.json train2017 shards/train2017 --workers 8"""


def build_parser() -> Parser:
    """The command line of `python -m jobs.shard`."""
    forms = "".join(f"\n  {action:7}{form}" for action, forms in FORMS.items() for form in forms)
    parser = CommandParser("jobs.shard", f"{__doc__}{forms}", EXAMPLE)
    parser.add_argument("action", choices=FORMS)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="as above")
    parser.add_argument("--workers", type=int, help="build, verify: parallel shards (1), as Ray tasks if more than 1")
    parser.add_argument("--samples-per-shard", type=int, help=f"build: images per tar ({SAMPLES_PER_SHARD})")
    parser.add_argument("--mib-per-shard", type=int, help="build: maximum size of a tar instead, in MiB")
    parser.add_argument("--limit", type=int, help="build: only the first N images by id (of each split)")
    parser.add_argument("--exif", choices=EXIF, help="build: apply EXIF orientations to images (auto: by their size)")
    add_dataset_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the action; returns 1 if verify or diff found something, else 0."""
    forms, paths = FORMS[args.action], args.paths
    if len(paths) not in [len(form.split()) for form in forms]:
        raise ConfigError(f"jobs.shard {args.action} takes {' or '.join(forms)}; got {len(paths)} paths")
    flags = {name: value for name in FLAGS["build"] if (value := getattr(args, name)) is not None}
    for name in flags.keys() - set(FLAGS.get(args.action, ())):
        raise ConfigError(f"jobs.shard {args.action} does not take --{name.replace('_', '-')}")
    if {"samples_per_shard", "mib_per_shard"} <= flags.keys():
        raise ConfigError("--samples-per-shard and --mib-per-shard exclude each other")
    if args.action == "build":
        try:
            return max(map(_show, build(args, flags)))
        except KeyboardInterrupt:
            print(f"finished shards are kept in {paths[-1]}; run the same command again", file=sys.stderr)
            raise
    if args.action == "info":
        return _show(load_index(paths[0]), shards=True)
    found = verify_shards(*paths, **flags) if args.action == "verify" else diff_shards(*paths)
    for line in found:
        print(f"error: {line}" if args.action == "verify" else line)
    if not found:
        print(f"{paths[0]} is sound" if args.action == "verify" else "the same bytes in the same order")
    return 1 if found else 0


def _show(index: ShardIndex, shards: bool = False) -> int:
    print("\n".join(load_summary(index).table(index)))
    for shard in index.shards if shards else ():
        print(f"{shard.name}  {shard.samples:,} images  {shard.bytes:,} bytes  sha256 {shard.sha256[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
