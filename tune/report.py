"""`python -m tune.report SWEEP`: what a sweep has found, as one HTML page and PNG files, also in MLflow.

It works on a sweep that has ended, was killed or is still running. A name without a sweep, an empty folder and a file
of another version exit with 2.
"""

import argparse
import sys

from jobs.cli import CommandParser, Parser, add_tracking_argument, main

EXAMPLE = """python -m tune.report runs/demo-sweep
  python -m tune.report demo-sweep --register=my-detector"""


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("tune.report", "Show what a sweep has found: a page, plots, the best config.", EXAMPLE)
    parser.add_argument("sweep", metavar="SWEEP", help="folder of a sweep, or its name under runs/")
    add_register_argument(parser)
    add_tracking_argument(parser, "the sweep's own, else ")
    return parser


def add_register_argument(parser: Parser) -> None:
    """Add `--register[=NAME]`."""
    parser.add_argument(
        "--register",
        nargs="?",
        const="",
        metavar="NAME",
        help="make the best trial a version of a model, with the alias challenger; --register=NAME names the model "
        "(default: tracking.register_as of the config, else the sweep's name)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the report, print the table, register."""
    from tune.results.register import choose_model_name  # each command imports only its own part
    from tune.results.source import find_sweep, read_results

    folder = find_sweep(args.sweep)
    if args.register is not None:
        choose_model_name(args.register, read_results(folder).space.base)
    from tune.results.listing import list_exchanges, list_outcomes
    from tune.results.report import report_sweep  # wrong input fails before this import, which takes seconds

    written = report_sweep(folder, args.tracking_uri)
    results = written.results
    print(list_outcomes(results.space, results.outcomes))
    if exchanged := list_exchanges(results.ledger):
        print(exchanged)
    print(f"page: {written.page}" + (" (also in MLflow)" if written.logged else ""))
    if args.register is not None:
        print_registered(folder, args.register, args.tracking_uri)
    return 0


def print_registered(folder: str, name: str, tracking_uri: str | None = None) -> None:
    """Register the best trial of the sweep in `folder` and print the address of the version."""
    from tune.results.register import ALIAS, register_best
    from tune.results.source import read_results

    model, version = register_best(read_results(folder), name, tracking_uri)
    print(f"models:/{model}/{version} = models:/{model}@{ALIAS}")


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
