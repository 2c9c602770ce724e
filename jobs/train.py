"""Train: `python -m jobs.train CONFIG key=value ...`, on this machine or on the Ray cluster it is submitted to.

It checks everything, trains (`pipeline.launch.driver`), and registers the best checkpoint if the config says so.
"""

import argparse
import sys

from jobs.cli import CommandParser, add_config_arguments, main
from jobs.presets import find_config
from pipeline.config import Config, load_config
from pipeline.files.storage import join
from pipeline.runs.record import run_exists
from pipeline.tracking.store import choose_store, how_to_find


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(
        "jobs.train",
        "Train a detector, evaluate it after each epoch, track and register it.",
        "python -m jobs.train r50_deformable data.train=shards/train data.val=shards/val name=first",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="must",
        default="no",
        choices=["must", "auto"],
        help="continue the run of this name: it must exist, or with =auto it is started if it does not",
    )
    parser.add_argument("--probe", action="store_true", help="as --dry-run, and measure two steps: hours and memory")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the plan with --dry-run or --probe, else train to the end."""
    config = load_config(find_config(args.config), args.overrides)
    if args.dry_run or args.probe:
        from pipeline.launch.preview import preview  # not at the top: each branch imports only its own part

        print(preview(config, args.resume, args.probe))
        return 0
    from pipeline.launch.preflight import check_run

    checked = check_run(config, args.resume)  # wrong input fails before the imports below, which take seconds
    from pipeline.launch.driver import train
    from pipeline.launch.run_report import report_run
    from pipeline.registry.register import register

    try:
        record = train(config, resume=args.resume, checked=checked)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_continue(config)) from None
    print(f"run {record.name} finished: {record.folder}")
    for name, value in record.metrics.items():
        missing = name.startswith("val/") and value < 0  # no object of that size in the ground truth
        print(f"  {name:<17} {'-' if missing else f'{value:.4f}'}")
    if config.tracking.register_as:
        version = register(record, config.tracking.register_as, config.tracking.alias)
        alias = config.tracking.alias and f" as @{config.tracking.alias}"
        where = how_to_find(choose_store(record=record))
        print(f"registered models:/{config.tracking.register_as}/{version}{alias}{where}")
    if report := report_run(record):
        print(report)
    return 0


def how_to_continue(config: Config) -> str:
    """How to continue after Ctrl-C; empty if the run was not started, or its storage does not answer."""
    try:
        started = run_exists(join(config.storage, config.name))
    except OSError:
        started = False
    return f"continue run {config.name} by the same command with --resume" if started else ""


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
