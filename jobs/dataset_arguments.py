"""What `jobs.lint` and `jobs.shard build` share: the flags for a whole data set, which is a folder or an archive.

Flags that do not fit the paths are a ConfigError.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from jobs.cli import Parser
from pipeline.data.importing.build import build_dataset
from pipeline.data.importing.classes import parse_choice
from pipeline.data.importing.dataset import Options
from pipeline.data.importing.layouts import FORMATS
from pipeline.data.index import ShardIndex
from pipeline.data.sharding.shards import build_shards
from pipeline.errors import ConfigError

NAMES = ("format", "split", "classes", "exclude", "merge", "drop_unused")
SIZES = ("workers", "samples_per_shard", "mib_per_shard")


def add_dataset_arguments(parser: Parser, made: str = "0.1 if val is missing, else none", drop: bool = True) -> None:
    """Add the flags, all without a default value.

    Args:
        parser: of the command.
        made: the share of missing splits without the flag, for its help.
        drop: whether there is a flag to drop classes without a box.
    """
    group = parser.add_argument_group("for DATASET")
    group.add_argument("--format", choices=FORMATS, help="its layout, where it is not recognised")
    group.add_argument(
        "--split",
        type=float,
        metavar="SHARE",
        help=f"share of train that each missing one of val and test gets ({made}); 0: none",
    )
    group.add_argument("--classes", metavar="A,B", help="only these classes")
    group.add_argument("--exclude", metavar="A,B", help="all classes but these")
    group.add_argument("--merge", metavar="A,B=C", action="append", help="classes A and B become C; may be repeated")
    if drop:
        group.add_argument("--drop-unused", action="store_true", default=None, help="drop classes without a box")


def read_options(args: argparse.Namespace) -> Options:
    """The options that the flags ask for. Raises ConfigError."""
    choice = parse_choice(args.merge or (), args.classes or "", args.exclude or "")
    return Options(args.format, args.split, choice, bool(args.drop_unused), args.exif or "auto", args.limit)


def refuse_dataset_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError if there are such flags where ANNOTATIONS and IMAGES are given."""
    for name in NAMES:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is for DATASET, a folder or an archive with its annotations")


def lint_words(args: argparse.Namespace) -> list[str]:
    """The words of the `jobs.lint` command for DATASET, the first path, with the same flags."""
    words = ["python", "-m", "jobs.lint", *getattr(args, "paths", [])[:1]]
    for name in (*NAMES, "exif", "limit"):
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None:
            for one in value if isinstance(value, list) else [value]:
                words += [flag, str(one)]
    return words


def build(args: argparse.Namespace, flags: Mapping[str, Any]) -> list[ShardIndex]:
    """Build the shards of `jobs.shard build`; `flags` are those that were given."""
    *data, out = args.paths
    if len(data) == 2:
        refuse_dataset_flags(args)
        return [build_shards(data[0], data[1], out, **flags)]
    sizes = {name: flags[name] for name in SIZES if name in flags}
    return list(build_dataset(data[0], out, read_options(args), command=lint_words(args), **sizes).values())
