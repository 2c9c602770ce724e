"""Check your COCO-format annotations and their images before `jobs.shard build`.

Shows everything wrong or unusual, with counts, examples and what the pipeline does: refuse it, drop or clamp boxes in
training, or keep it. Exits 1 if a build would refuse the data. The rules are in `pipeline.data.sharding.rules`.
"""

import argparse
import sys
from pathlib import Path

from jobs.cli import CommandParser, Parser, main
from pipeline.data.sharding.annotations import lint_command
from pipeline.data.sharding.both_ways import check_empty, draw_both_ways
from pipeline.data.sharding.lint import Examination, examine
from pipeline.data.sharding.orientation import EXIF, orientation_advice
from pipeline.errors import ConfigError


def build_parser() -> Parser:
    """The command line of `python -m jobs.lint`."""
    parser = CommandParser("jobs.lint", __doc__, "python -m jobs.lint train.json images/train")
    parser.add_argument("annotations", metavar="ANNOTATIONS", help="COCO JSON: images, annotations, categories")
    parser.add_argument("images", metavar="IMAGES", nargs="?", help="their folder, zip, tar or folder of tars; decoded")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode (1), Ray tasks if more than 1")
    parser.add_argument("--limit", type=int, help="check only the first N images by id")
    parser.add_argument(
        "--exif", choices=EXIF, default="auto", help="apply EXIF orientations to images (auto: by size)"
    )
    parser.add_argument("--draw", metavar="FOLDER", help="draw boxes both ways on the images that EXIF rotates")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 1 if a build would refuse the data."""
    if args.draw is not None and args.images is None:
        raise ConfigError("--draw needs IMAGES, the images to draw on")
    if args.draw is not None:
        check_empty(Path(args.draw))
    found = examine(
        Path(args.annotations), args.images, limit=args.limit, decode=True, workers=args.workers, exif=args.exif
    )
    command = lint_command(Path(args.annotations), args.images)
    for line in [*found.findings.table(), *orientation_advice(found.orientations.values(), found.findings, command)]:
        print(line)
    if args.draw is not None:
        _draw(found, Path(args.draw))
    faults = len(found.findings.refused())
    hint = "" if args.images else "; give IMAGES to check the images as well"
    print(
        f"{len(found.source.images):,} images, {len(found.source.categories):,} categories: "
        + (f"a build refuses them, see the {faults} lines marked `refuse`" if faults else "a build accepts them")
        + hint
    )
    return 1 if faults else 0


def _draw(found: Examination, folder: Path) -> None:
    if not found.orientations:
        print("EXIF rotates no image: nothing to draw")
        return
    drawn = draw_both_ways(found, folder)
    print(f"{len(drawn)} images in {folder}: left their boxes as stored, right as displayed")


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
