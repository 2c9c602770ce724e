"""Check COCO-format annotations of one's own, and their pictures, before `jobs.shard build`.

Shows what is wrong or odd, with counts, examples and what the pipeline does about it: refuse it, drop or clamp boxes in
training, or keep it. Exits 1 if a build would refuse the data. The rules are in `pipeline.data.rules`.
"""

import argparse
import sys
from pathlib import Path

from jobs.cli import CommandParser, Parser, main
from pipeline.data.lint import examine


def build_parser() -> Parser:
    """The command line of `python -m jobs.lint`."""
    parser = CommandParser("jobs.lint", __doc__, "python -m jobs.lint train.json images/train")
    parser.add_argument("annotations", metavar="ANNOTATIONS", help="COCO JSON: images, annotations, categories")
    parser.add_argument("images", metavar="IMAGES", nargs="?", help="their folder, zip, tar or folder of tars; decoded")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode (1), Ray tasks if more than 1")
    parser.add_argument("--limit", type=int, help="look only at the first N images by id")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if there is something that a build refuses."""
    found = examine(Path(args.annotations), args.images, limit=args.limit, decode=True, workers=args.workers)
    for line in found.findings.table():
        print(line)
    faults = len(found.findings.refused())
    pictures = "" if args.images else "; give IMAGES to check the pictures as well"
    print(
        f"{len(found.source.images):,} images, {len(found.source.categories):,} categories: "
        + (f"a build refuses them, see the {faults} above marked so" if faults else "a build takes them")
        + pictures
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
