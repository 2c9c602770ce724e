"""Look at the samples of a shard folder: a page with every image as stored and as training sees it, with boxes."""

import argparse
import sys
from pathlib import Path

from jobs.cli import CommandParser, Parser, main
from jobs.presets import CONFIG_HELP, find_config
from pipeline.config import Config, load_config, override
from pipeline.errors import ConfigError
from pipeline.files.outputs import check_output, write_text

EXAMPLE = """python -m jobs.show shards/train data.augment.preset=strong
  python -m jobs.show shards/train --config r50_deformable --class person --images 100"""
PAGE = "samples.html"


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("jobs.show", __doc__, EXAMPLE)
    parser.add_argument("shards", metavar="SHARDS", help="a folder or URL that `jobs.shard build` wrote")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. data.augment.mosaic=1")
    parser.add_argument("--config", metavar="CONFIG", help=f"settings to start from: {CONFIG_HELP}")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("runs/show"), help="default: %(default)s")
    parser.add_argument("--images", type=int, default=24, help="how many, in equal distances (%(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="how often each is shown as trained (%(default)s)")
    parser.add_argument("--class", dest="class_name", default="", metavar="NAME", help="only images with this class")
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, draw, write."""
    if args.images < 1 or args.epochs < 0:
        raise ConfigError(f"--images must be at least 1 and --epochs at least 0, not {args.images} and {args.epochs}")
    config = (
        load_config(find_config(args.config), args.overrides) if args.config else override(Config(), args.overrides)
    )
    data = config.data.model_copy(update={"train": args.shards})
    page = args.out / PAGE
    check_output(page, [] if "://" in args.shards else [Path(args.shards)])
    from pipeline.evaluation.gallery import Choice, gallery_page  # not at the top: they load torch
    from pipeline.pages.render import render

    choice = Choice(args.images, args.epochs, args.class_name)
    write_text(page, render(gallery_page(config.model_copy(update={"data": data}), choice)))
    print(f"page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
