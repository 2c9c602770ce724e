"""`python -m jobs.settings`: every setting of a run with its type, default, bounds and meaning."""

import argparse
import sys

from jobs.cli import CommandParser, Parser, main
from pipeline.config.reference import as_markdown, as_text, find


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser(
        "jobs.settings", "Print settings with type, default, bounds and meaning.", "python -m jobs.settings optim.lr"
    )
    parser.add_argument("key", nargs="?", default="", metavar="KEY", help="a section or a setting (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown, as in docs/settings.md")
    return parser


def run(args: argparse.Namespace) -> int:
    """Find and print."""
    chosen = find(args.key)
    print(as_markdown(chosen) if args.markdown else as_text(chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
