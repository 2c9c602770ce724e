"""`python -m jobs.promote`: make a version of a model the champion if it is better on the same data."""

import argparse
import json
import sys
from pathlib import Path

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from pipeline.errors import InputError
from pipeline.files.outputs import check_output, write_text
from pipeline.launch.evaluation_request import OPEN_KEYS
from pipeline.launch.promotion_request import PromotionRequest, check_request

DESCRIPTION = """Evaluate two versions of a registered model on the same shards, compare them by a paired bootstrap over
images, and move the alias if the first one is better. Exit codes: 0 promoted, 3 refused, 2 wrong input.
The version that had the alias before is @previous (for --to NAME: @previous-NAME)."""
EXAMPLE = """python -m jobs.promote mine
  python -m jobs.promote mine data.val=shards/test --min-gain 0 --no-class-below -0.05 scaling.num_workers=4
  python -m jobs.promote mine --rollback"""
REFUSED = 3


def build_parser() -> Parser:
    """The command line."""
    defaults = PromotionRequest("")
    parser = CommandParser("jobs.promote", DESCRIPTION, EXAMPLE)
    parser.add_argument("name", metavar="NAME", help="registered model")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"for both versions, of {OPEN_KEYS}")
    parser.add_argument(
        "--from", dest="source", default=defaults.source, metavar="VERSION", help="alias or number (%(default)s)"
    )
    parser.add_argument(
        "--to", dest="target", default=defaults.target, metavar="ALIAS", help="alias that it gets (%(default)s)"
    )
    parser.add_argument("--metric", default=defaults.metric, help="number that must gain (%(default)s)")
    parser.add_argument(
        "--min-gain", type=float, default=defaults.min_gain, metavar="X", help="least gain (%(default)s)"
    )
    parser.add_argument(
        "--no-class-below",
        type=float,
        default=defaults.no_class_below,
        metavar="X",
        help="least difference of the AP of each class; -1 allows all (%(default)s)",
    )
    parser.add_argument("--draws", type=int, default=defaults.draws, help="of the bootstrap (%(default)s)")
    parser.add_argument("--force", action="store_true", help="promote without a comparison; the tags say so")
    parser.add_argument("--rollback", action="store_true", help="give the alias back to the version before")
    parser.add_argument("--json", metavar="FILE", help="write all numbers as JSON; - is standard output, without table")
    add_tracking_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Promote and report."""
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    request = PromotionRequest(**settings)
    check_request(request)
    out = None if args.json in (None, "-") else Path(args.json)
    if args.json == "":
        raise InputError("--json needs a file, or - for standard output")
    if out:
        check_output(out)
    from pipeline.launch.promotion import promote  # not at the top: it takes seconds
    from pipeline.launch.promotion_report import as_text, as_tree

    promotion = promote(request)
    document = json.dumps(as_tree(promotion), indent=1)
    if out:
        write_text(out, document + "\n")
    print(document if args.json == "-" else as_text(promotion))
    return REFUSED if promotion.refused else 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
