"""`python -m jobs.evaluate`: the 12 COCO numbers of a run, of a registered model, or of a COCO results file."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from pipeline.errors import InputError
from pipeline.files.outputs import check_outputs, write_text
from pipeline.launch.evaluation_request import OPEN_KEYS, check_request

if TYPE_CHECKING:
    from pipeline.evaluation.class_table import ClassScore

EXAMPLE = """python -m jobs.evaluate models:/deformable-detr-demo@champion evaluation.flip=true --json -
  python -m jobs.evaluate runs/mine data.val=shards/test --split test --per-class --log scaling.num_workers=4
  python -m jobs.evaluate --results detections.json --annotations instances_val2017.json"""


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("jobs.evaluate", "Box AP as by pycocotools; -1: no object has that size.", EXAMPLE)
    parser.add_argument("model", nargs="?", metavar="RUN|models:/NAME@ALIAS|FOLDER", help="what to evaluate")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"of {OPEN_KEYS}")
    parser.add_argument("--results", type=Path, metavar="R.json", help="COCO results file, instead of a model")
    parser.add_argument("--annotations", type=Path, metavar="A.json", help="COCO annotations that the results are of")
    parser.add_argument("--split", metavar="NAME", help="name of the data: numbers become NAME/AP and so on")
    parser.add_argument("--per-class", action="store_true", help="also a table of the classes, worst first")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON; - is standard output, without table")
    parser.add_argument("--save-results", type=Path, metavar="FILE", help="write the detections as COCO results JSON")
    parser.add_argument(
        "--log", action="store_true", help="log numbers, results and data set in the model's MLflow run"
    )
    add_tracking_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluate and report."""
    if (args.results is None) != (args.annotations is None) or (args.model is None) == (args.results is None):
        raise InputError("give either a run or models:/NAME@ALIAS, or --results and --annotations without settings")
    if args.results and (args.log or args.save_results):
        raise InputError("--log and --save-results need a model; a results file has no run and no other detections")
    out = None if args.json in (None, "-") else Path(args.json)
    outputs = [path for path in (out, args.save_results) if path]
    if args.results:
        check_outputs(outputs, [args.results, args.annotations])
        from pipeline.evaluation.class_table import score_file  # not at the top: each branch is fast

        report(args, out, *score_file(args.results, args.annotations))
        return 0
    request = check_request(args.model, args.overrides, args.split, args.log, args.tracking_uri)
    from pipeline.launch.model_evaluation import evaluate_model

    evaluation = evaluate_model(request, outputs)
    if args.save_results:
        evaluation.save_results(args.save_results)
    report(args, out, evaluation.result.metrics, evaluation.classes)
    evaluation.log()  # last: a store that does not answer loses no number
    return 0


def report(args: argparse.Namespace, out: Path | None, metrics: dict[str, float], classes: list["ClassScore"]) -> None:
    """Print and write the numbers."""
    from pipeline.evaluation.class_table import class_table

    named = {f"{args.split}/{key}" if args.split else key: value for key, value in metrics.items()}
    document = json.dumps(named | ({"classes": [asdict(row) for row in classes]} if args.per_class else {}), indent=1)
    if out:
        write_text(out, document + "\n")
    table = "\n".join(f"{key:<{max(map(len, named))}} {value:8.4f}" for key, value in named.items())
    print(document if args.json == "-" else f"{table}\n\n{class_table(classes)}" if args.per_class else table)


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
