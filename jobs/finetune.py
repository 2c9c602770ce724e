"""From a data set to a registered model in one command: check, shards, training, test, registration, report.

DATASET is a folder, zip or tar as labelling tools write it (see jobs.lint); classes without a box are dropped. The
preset and its settings are chosen for the number of images and this machine; key=value overrides them, such as
model.init_from=RUN, the weights to start from.
Stopped or killed at any moment, the same command continues.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from jobs.cli import CommandParser, Parser, main
from jobs.dataset_arguments import add_dataset_arguments, lint_words, read_options
from jobs.presets import find_config
from pipeline.config import Config, load_config
from pipeline.data.sharding.orientation import EXIF

EXAMPLE = "python -m jobs.finetune export.zip name=cells model.init_from=runs/demo"
SHARE = 0.1  # of a missing validation or test split


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("jobs.finetune", __doc__, EXAMPLE)
    parser.add_argument("paths", nargs=1, metavar="DATASET", help="folder, zip or tar with images and annotations")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings: name=N, model.init_from=RUN, ...")
    parser.add_argument("--preset", default="", metavar="CONFIG", help="instead of the one chosen: a name or YAML file")
    parser.add_argument("--dry-run", action="store_true", help="check the data set, print the settings, start nothing")
    parser.add_argument("--exif", choices=EXIF, help="apply EXIF orientations to images (auto: by their size)")
    add_dataset_arguments(parser, made=f"{SHARE:g}", drop=False)
    parser.set_defaults(limit=None, drop_unused=True)
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what is not done yet, and say what comes next."""
    args.split = SHARE if args.split is None else args.split
    words = lint_words(args)
    from pipeline.launch.finetune.machine import this_machine  # not at the top: it loads torch
    from pipeline.launch.finetune.run import Finetuning, Request

    flags = shlex.join([*words[4:], *(["--preset", args.preset] if args.preset else [])])
    request = Request(args.paths[0], read_options(args), flags, tuple(words), args.preset, tuple(args.overrides), load)
    work = Finetuning(request, this_machine())
    if args.dry_run:
        work.project = work.project or work.accept()
        print(work.describe())
        return 0
    try:
        outcome = work.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command continues") from None
    print(outcome)
    return 0


def load(preset: str, settings: Sequence[str]) -> Config:
    """A preset with settings over it."""
    return load_config(find_config(preset), list(settings))


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
