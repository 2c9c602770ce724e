"""`python -m jobs.table`: the presets of the paper's tables, with published and own figures side by side."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from jobs.presets import CONFIGS
from pipeline.config import Config
from pipeline.errors import InputError, TrackingError
from pipeline.files.outputs import check_output, write_text
from pipeline.progress import Progress
from pipeline.tracking.store import choose_store

if TYPE_CHECKING:  # --help needs no torch
    from pipeline.presets.trained import TrainedRun


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("jobs.table", "Published and own figures of every preset.", "python -m jobs.table --fps 3")
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="only these, e.g. r50_detr (default: all)")
    parser.add_argument("--fps", type=int, default=0, metavar="N", help="also time N images each, on the GPU if any")
    parser.add_argument("--val", metavar="FOLDER", help="shards whose image sizes count (default: 80 of val2017)")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON; - is standard output, without table")
    add_tracking_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Build the rows and print the table."""
    if args.fps < 0:
        raise InputError(f"--fps {args.fps} must be at least 0")
    import torch

    from pipeline.presets.rows import VAL_SIZES, describe, find_presets, images_per_second, select, sizes_of
    from pipeline.presets.table import as_json, as_text

    path = None if args.json in (None, "-") else Path(args.json)
    if path:
        check_output(path)
    presets = select(find_presets(CONFIGS), args.presets)
    sizes = VAL_SIZES if args.val is None else sizes_of(args.val)
    trained = trained_runs(args.tracking_uri, presets)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with Progress(len(presets), "counting", "preset") as bar:
        for name, config in presets.items():
            row = dataclasses.replace(describe(name, config, sizes), trained=trained.get(name))
            if args.fps:
                row = dataclasses.replace(row, fps=images_per_second(config, args.fps, device))
            rows.append(row)
            bar.advance()
    if path:
        write_text(path, as_json(rows) + "\n")
    print(as_json(rows) if args.json == "-" else as_text(rows, args.markdown))
    return 0


def trained_runs(uri: str | None, presets: Mapping[str, Config]) -> dict[str, "TrainedRun"]:
    """Trained runs in MLflow. If a default store does not answer there are none, because nothing was trained yet."""
    from pipeline.presets.trained import find_trained

    try:
        return find_trained(choose_store(uri), presets)
    except TrackingError as error:
        if uri:
            raise
        print(f"no trained runs: {error}", file=sys.stderr)
        return {}


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
