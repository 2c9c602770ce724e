"""`python -m jobs.evaluate`: the 12 COCO numbers of a run, of a registered model, or of a COCO results file."""

import argparse
import json
import sys
from pathlib import Path

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from pipeline.config import override
from pipeline.errors import ConfigError, InputError, after_start
from pipeline.files.outputs import check_output, write_text

OPEN: tuple[str, ...] = ("data.val", "data.workers", "data.augment.eval_size", "data.augment.max_size")
OPEN += ("data.cache_dir", "data.cache_gib", "evaluation.")
EXAMPLE = """python -m jobs.evaluate models:/deformable-detr-demo@champion evaluation.flip=true --json -
  python -m jobs.evaluate --results detections.json --annotations instances_val2017.json"""


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("jobs.evaluate", "Box AP by pycocotools; -1: no object has that size.", EXAMPLE)
    parser.add_argument("model", nargs="?", metavar="RUN|models:/NAME@ALIAS|FOLDER", help="what to evaluate")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"of {', '.join(OPEN)}*")
    parser.add_argument("--results", type=Path, metavar="R.json", help="COCO results file, instead of a model")
    parser.add_argument("--annotations", type=Path, metavar="A.json", help="COCO annotations that the results are of")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON; - is standard output, without table")
    add_tracking_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluate and report."""
    if (args.results is None) != (args.annotations is None) or (args.model is None) == (args.results is None):
        raise InputError("give either a run or models:/NAME@ALIAS, or both --results and --annotations")
    path = None if args.json in (None, "-") else Path(args.json)
    if args.results:
        if path:
            check_output(path, [args.results, args.annotations])
        from pipeline.evaluation.coco import coco_ap, ground_truth_of_file  # not at the top: each branch is fast
        from pipeline.evaluation.detections import from_results_json

        metrics = coco_ap(ground_truth_of_file(args.annotations), from_results_json(args.results))
    else:
        metrics = evaluate_model(args.model, args.overrides, args.tracking_uri, path)
    if path:
        write_text(path, json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics) if args.json == "-" else "\n".join(f"{k:<10} {v:8.4f}" for k, v in metrics.items()))
    return 0


def evaluate_model(model: str, overrides: list[str], tracking_uri: str | None, out: Path | None) -> dict[str, float]:
    """The METRICS of a run's best checkpoint or of a registered version over `data.val`; `out` must be writable."""
    closed = [text for text in overrides if not text.partition("=")[0].startswith(OPEN)]
    if closed:
        raise ConfigError(f"{', '.join(closed)}: for a trained model only {', '.join(OPEN)}* can be set")
    import torch

    from pipeline.checkpoint import load_inference
    from pipeline.engine.cpu_tuning import tune_model
    from pipeline.evaluation.evaluator import build_evaluator
    from pipeline.registry.locate import checkpoint_folder
    from pipeline.runtime import single

    with checkpoint_folder(model, tracking_uri) as folder:
        if out:
            check_output(out, [folder])
        inference = load_inference(folder)
    config = override(inference.config, overrides)
    runtime = single("cuda" if torch.cuda.is_available() else "cpu")
    evaluator = build_evaluator(config.data, config.evaluation, runtime)
    if evaluator.loader.index.categories != inference.categories:
        raise ConfigError(f"{config.data.val} has other categories than the model was trained on; set data.val")
    tune_model(inference.model, config.train, runtime.device)
    with after_start():
        result = evaluator.run(inference.model.to(runtime.device))
    return result.metrics if result else {}  # a single process is rank 0, so there is a result


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
