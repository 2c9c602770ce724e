"""`python -m jobs.analyse`: why the AP of a model is what it is, as one HTML page, plots and JSON."""

import argparse
import sys
from pathlib import Path

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from pipeline.launch.analysis_request import AnalysisRequest, check_request
from pipeline.launch.evaluation_request import OPEN_KEYS

EXAMPLE = """python -m jobs.analyse models:/deformable-detr-demo@champion --against runs/other
  python -m jobs.analyse results.json --annotations instances_val2017.json --out analysis"""
CLASSES = 20  # of the table for the terminal


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("jobs.analyse", "Say why AP is what it is: a page, plots, JSON.", EXAMPLE)
    parser.add_argument(
        "target", metavar="RUN|models:/NAME@ALIAS|FOLDER|RESULTS.json", help="a model, or a COCO results file"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"of {OPEN_KEYS}")
    parser.add_argument("--against", metavar="OTHER", help="another model or results file, to compare with")
    parser.add_argument("--annotations", type=Path, metavar="A.json", help="ground truth of results files")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/analysis/NAME")
    parser.add_argument("--draws", type=int, default=200, help="of the bootstrap; 0: no intervals (%(default)s)")
    add_tracking_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, analyse, report."""
    request = AnalysisRequest(
        args.target, args.against, args.annotations, args.overrides, args.out, args.tracking_uri, args.draws
    )
    check_request(request)
    from pipeline.evaluation.analysis.classes import summarise, table_of_classes  # not at the top: they take seconds
    from pipeline.launch.model_analysis import run_analysis

    written = run_analysis(request)
    print(table_of_classes(written.analysis, CLASSES))
    print(summarise(written.analysis))
    print(f"page: {written.page}" + (f"\nMLflow: {written.logged}" if written.logged else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
