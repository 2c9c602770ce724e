"""`python -m jobs.export`: export a run or a registered model to ONNX (`.onnx`) or a torch.export archive (`.pt2`).

The file's inputs are `images` (uint8, RGB, padded right and bottom) and `sizes` (height and width without the padding).
Its outputs are `scores`, `labels` and `boxes_xyxy` (relative to the image). It contains the names of the labels.
"""

import argparse
import sys
from pathlib import Path

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from pipeline.errors import ConfigError
from pipeline.files.outputs import check_output

EXAMPLE = """python -m jobs.export models:/mine@champion mine.onnx
  python -m jobs.export runs/mine mine.pt2 --size 800x1333"""


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("jobs.export", __doc__, EXAMPLE)
    parser.add_argument("model", metavar="RUN|models:/NAME@ALIAS|FOLDER", help="what to export")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, .onnx or .pt2")
    parser.add_argument("--size", metavar="HxW", help="accept images of this size only, e.g. 800x1333 (default: any)")
    parser.add_argument("--top-k", type=int, default=100, help="detections per image (default: %(default)s)")
    parser.add_argument(
        "--keep-op", action="store_true", help=".pt2 only: keep the operator, for use with this project"
    )
    add_tracking_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Trace the model, write the file, compare its detections, print a summary."""
    size = parse_size(args.size)
    if args.out.suffix not in (".onnx", ".pt2") or (args.keep_op and args.out.suffix != ".pt2"):
        raise ConfigError(f"{args.out}: write OUT.onnx or OUT.pt2; --keep-op needs OUT.pt2")
    if args.top_k < 1:
        raise ConfigError(f"--top-k {args.top_k} must be at least 1")
    from pipeline.checkpoint import load_inference  # wrong arguments are reported before torch is loaded
    from pipeline.inference.export import trace, write_archive, write_onnx
    from pipeline.registry.locate import checkpoint_folder

    with checkpoint_folder(args.model, args.tracking_uri) as folder:
        check_output(args.out, [folder])
        inference = load_inference(folder)
    exported = trace(inference, args.top_k, size, args.keep_op)
    write = write_onnx if args.out.suffix == ".onnx" else write_archive
    share = write(exported, args.out)
    megabytes = args.out.stat().st_size / 1e6
    print(f"{args.out}: {megabytes:.1f} MB, images of {args.size or 'any size'}; {share:.1%} of its detections agree")
    return 0


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse `800x1333` into (800, 1333). Raises ConfigError."""
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (text.isascii() and height.isdecimal() and width.isdecimal()):
        raise ConfigError(f"--size {text}: write height x width, such as 800x1333")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
