"""`python -m jobs.predict`: the detections of a run or a registered model on images, printed, drawn, or in a file."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from pipeline.errors import InputError, StorageError
from pipeline.evaluation.drawing import THRESHOLD, TOP_K, Exif, draw_detections, drawing_paths, save_drawing

EXAMPLE = """python -m jobs.predict models:/deformable-detr-demo@champion street.jpg --out runs/predictions
  python -m jobs.predict models:/mine@champion photos.zip --out detections.parquet scaling.num_workers=4
  python -m jobs.predict runs/mine 'photos/**/*.jpg' list.txt --out detections.json --draw drawn --draw-as jpg"""
SOURCES = "image file or URL, folder, 'glob', zip or tar, shards (path or URL), or .txt of paths and URLs"
OUT = "FILE.json (COCO results) or FILE.parquet, else a folder as --draw; of image files by default runs/predictions"


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("jobs.predict", "Detect objects in images; writes, draws or prints them.", EXAMPLE)
    parser.add_argument("model", metavar="RUN|models:/NAME@ALIAS|FOLDER", help="a run, a version, or a checkpoint")
    parser.add_argument("sources", nargs="+", metavar="SOURCE|scaling.key=value", help=SOURCES)
    parser.add_argument("--out", type=Path, metavar="FILE|FOLDER", help=OUT)
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw every image into this folder")
    parser.add_argument("--draw-as", choices=("png", "jpg"), default="png", help="format of drawings (%(default)s)")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="lowest score kept (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=TOP_K, help="most detections per image (default: %(default)s)")
    parser.add_argument("--exif", choices=get_args(Exif), default="apply", help="EXIF orientation (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print an object per drawn image file instead of lines")
    add_tracking_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Draw and print a few image files, or predict on any number of images; exit code 1 if some are unreadable."""
    from pipeline.launch.prediction_request import DRAWINGS, check_request  # here, so that --help is fast

    request = check_request(args.sources, args.out, args.draw, f".{args.draw_as}")
    if request.outputs is None:
        return _show(args, request.images, args.out or DRAWINGS)
    if args.json:
        raise InputError("--json prints the boxes of image files that are drawn; name a results file: --out FILE.json")
    from pipeline.inference.predict_images import make_options
    from pipeline.launch.prediction import predict_images

    options = make_options(args.threshold, args.top_k, args.exif)
    found = predict_images(args.model, request.images, options, request.outputs, request.pool, args.tracking_uri)
    print(found)
    print(found.faults, end="", file=sys.stderr)
    return 1 if found.unreadable else 0


def _show(args: argparse.Namespace, images: tuple[Any, ...], out: Path) -> int:
    """Predict, draw and print, one image (an ImageSource) at a time."""
    from pipeline.inference.predict_images import read_source  # torch
    from pipeline.registry.load import load_detector

    for source in images:
        read_source(source, args.exif)  # damaged images are reported before anything is loaded or written
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is not a folder; choose another --out")
    targets = drawing_paths(out, [Path(source.name) for source in images])
    detector = load_detector(args.model, tracking_uri=args.tracking_uri)
    for source, target in zip(images, targets, strict=True):
        image = read_source(source, args.exif)  # without its EXIF tag, so that it is not turned twice
        found = detector(image, threshold=args.threshold, top_k=args.top_k)
        try:
            save_drawing(draw_detections(image, found.to_dict()), target)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error.strerror}; choose another --out") from None
        row = {"image": source.name, "drawn": str(target), **found.to_dict()}
        head = f"{source.name}: {len(found)} detections, drawn in {target}"
        print(json.dumps(row) if args.json else f"{head}\n{found}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
