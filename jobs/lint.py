"""Check your data set, or COCO-format annotations and their images, before `jobs.shard build`.

Shows everything wrong or unusual, with counts, examples and what the pipeline does: refuse it, drop or clamp boxes in
training, or keep it. Exits 1 if a build would refuse the data. The rules are in `pipeline.data.sharding.rules`.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import CommandParser, Parser, main
from jobs.dataset_arguments import add_dataset_arguments, lint_words, read_options, refuse_dataset_flags
from pipeline.data.importing.dataset import read_dataset
from pipeline.data.index import INDEX
from pipeline.data.sharding.annotations import lint_command
from pipeline.data.sharding.both_ways import check_empty, describe_drawn
from pipeline.data.sharding.lint import RotatedSample, examine
from pipeline.data.sharding.orientation import EXIF, orientation_advice
from pipeline.data.sharding.rules import Findings
from pipeline.errors import ConfigError


def build_parser() -> Parser:
    """The command line of `python -m jobs.lint`."""
    example = "python -m jobs.lint train.json images/train\n  python -m jobs.lint export.zip"
    parser = CommandParser("jobs.lint", __doc__, example)
    what = "a data set, folder or archive; or COCO JSON and its images (folder, zip, tar or folder of tars)"
    parser.add_argument("paths", metavar="DATASET | ANNOTATIONS [IMAGES]", nargs="+", help=what)
    parser.add_argument("--workers", type=int, default=1, help="processes that decode (1), Ray tasks if more than 1")
    parser.add_argument("--limit", type=int, help="check only the first N images by id (of each split)")
    parser.add_argument("--exif", choices=EXIF, help="apply EXIF orientations to images (auto: by size)")
    parser.add_argument("--draw", metavar="FOLDER", help="draw boxes both ways on the images that EXIF rotates")
    add_dataset_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 1 if a build would refuse the data."""
    if len(args.paths) > 2:
        raise ConfigError(f"jobs.lint takes DATASET, or ANNOTATIONS and IMAGES; got {len(args.paths)} paths")
    first, images = Path(args.paths[0]), (args.paths[1] if args.paths[1:] else None)
    is_dataset = images is None and first.suffix.lower() != ".json" and not os.path.isfile(first / INDEX)
    if args.draw is not None and images is None and not is_dataset:
        raise ConfigError("--draw needs IMAGES, the images to draw on")
    if args.draw is not None:
        check_empty(Path(args.draw))
    if is_dataset:
        whole = read_dataset(args.paths[0], read_options(args), decode=True, workers=args.workers)
        return _report(args, whole.findings, whole.rotated, shlex.join(lint_words(args)), whole.describe())
    refuse_dataset_flags(args)
    exif = read_options(args).exif
    found = examine(first, images, limit=args.limit, decode=True, workers=args.workers, exif=exif)
    counts = f"{len(found.source.images):,} images, {len(found.source.categories):,} categories"
    more = "" if images else "; give IMAGES to check the images as well"
    return _report(args, found.findings, found.rotated, lint_command(first, images), counts, more)


def _report(
    args: argparse.Namespace,
    findings: Findings,
    rotated: Sequence[RotatedSample],
    command: str,
    counts: str,
    more: str = "",
) -> int:
    advice = orientation_advice([orientation for *_, orientation in rotated], findings, command)
    for line in [*findings.table(), *advice]:
        print(line)
    if args.draw is not None:
        print(describe_drawn(rotated, Path(args.draw)))
    print(f"{counts}: {findings.verdict()}{more}")
    return 1 if findings.refused() else 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
