"""`python -m jobs.predict`: the detections of a run or a registered model on images, printed and drawn."""

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from pipeline.errors import InputError, StorageError
from pipeline.evaluation.drawing import THRESHOLD, TOP_K, Exif, Prediction, draw_detections, drawing_paths, save_drawing

EXAMPLE = "python -m jobs.predict models:/deformable-detr-demo@champion street.jpg --out runs/predictions"


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("jobs.predict", "Detect objects in images; draws PNG files and prints boxes.", EXAMPLE)
    parser.add_argument(
        "model", metavar="RUN|models:/NAME@ALIAS|FOLDER", help="a run's best checkpoint, a version, a checkpoint"
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG or PNG file")
    parser.add_argument("--out", type=Path, default=Path("runs/predictions"), help="folder of the drawn PNG files")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="lowest score shown (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=TOP_K, help="most detections per image (default: %(default)s)")
    parser.add_argument("--exif", choices=get_args(Exif), default="apply", help="EXIF orientation (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image instead of lines")
    add_tracking_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Predict, draw and print, one image at a time."""
    from pipeline.inference.predictor import read_image  # here, so that --help needs no torch
    from pipeline.registry.load import load_detector

    for path in args.images:
        read_image(path)  # missing or damaged images are reported before anything is loaded or written
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is not a folder; choose another --out")
    targets = drawing_paths(args.out, args.images)
    detector = load_detector(args.model, tracking_uri=args.tracking_uri)
    for path, target in zip(args.images, targets, strict=True):
        image = read_image(path, args.exif)  # without its EXIF tag, so that it is not turned twice
        prediction = detector(image, threshold=args.threshold, top_k=args.top_k).to_dict()
        try:
            save_drawing(draw_detections(image, prediction), target)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error.strerror}; choose another --out") from None
        if args.json:
            print(json.dumps({"image": str(path), "drawn": str(target), **prediction}))
        else:
            _report(path, target, prediction)
    return 0


def _report(path: Path, target: Path, prediction: Prediction) -> None:
    print(f"{path}: {len(prediction['boxes'])} detections, drawn in {target}")
    for box, score, label in zip(prediction["boxes"], prediction["scores"], prediction["labels"], strict=True):
        x, y, width, height = box
        print(f"  {label:<16} {score:.3f}  x {x:7.1f}  y {y:7.1f}  width {width:7.1f}  height {height:7.1f}")


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
