"""`python -m jobs.register`: register a run's best checkpoint as a version of a model."""

import argparse
import sys

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from pipeline.config import from_record
from pipeline.runs.record import read_run
from pipeline.tracking.store import choose_store, how_to_find

EXAMPLE = "python -m jobs.register runs/demo --name deformable-detr-demo"


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("jobs.register", "Make a run's best checkpoint models:/NAME@ALIAS.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or its name under runs/")
    parser.add_argument("--name", help="registered model (default: the run's tracking.register_as, else its name)")
    parser.add_argument(
        "--alias",
        default="challenger",
        help="alias for this version (%(default)s); champion is set without a comparison, see jobs.promote",
    )
    add_tracking_argument(parser, "the run's own, else ")
    return parser


def run(args: argparse.Namespace) -> int:
    """Register, and print the address of the version."""
    record = read_run(args.run)  # a wrong name fails before torch is loaded
    from pipeline.registry.register import register

    name = args.name or from_record(record.config, record.folder).tracking.register_as or record.name
    version = register(record, name, args.alias, args.tracking_uri)
    where = how_to_find(choose_store(args.tracking_uri, record=record))
    print(f"models:/{name}/{version}" + (f" = models:/{name}@{args.alias}" if args.alias else "") + where)
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
