"""`python -m jobs.models`: the registered models, the versions of one, or where a version comes from."""

import argparse
import json
import sys
from dataclasses import asdict

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from pipeline.config.names import check_model_name
from pipeline.errors import InputError

EXAMPLE = """python -m jobs.models
  python -m jobs.models mine
  python -m jobs.models mine --lineage challenger --against champion"""


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("jobs.models", "List registered models, or the versions of one.", EXAMPLE)
    parser.add_argument("name", nargs="?", metavar="NAME", help="registered model (default: list all of them)")
    parser.add_argument("--lineage", metavar="VERSION", help="where this version (number or alias) comes from")
    parser.add_argument(
        "--against", metavar="VERSION", help="with --lineage: which settings and images differ from this version's"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_tracking_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Look up and print."""
    if args.lineage is not None and args.name is None:
        raise InputError("--lineage needs the NAME of a registered model")
    if args.against is not None and args.lineage is None:
        raise InputError("--against needs --lineage VERSION")
    try:
        check_model_name(args.name or "all")
    except ValueError as error:
        raise InputError(f"NAME: {error}") from None
    from pipeline.registry import listing, listing_text  # not at the top: it takes seconds
    from pipeline.tracking.store import choose_store

    store = choose_store(args.tracking_uri)
    if args.name is None:
        models = listing.list_models(store)
        print(json.dumps([asdict(row) for row in models], indent=1) if args.json else listing_text.models_text(models))
    elif args.lineage is None:
        rows = listing.list_rows(store, args.name)
        print(json.dumps(rows, indent=1) if args.json else listing_text.rows_text(rows))
    else:
        tree = listing.trace(store, args.name, args.lineage, args.against)
        print(json.dumps(tree, indent=1) if args.json else listing_text.lineage_text(tree))
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
