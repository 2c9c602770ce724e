"""`python -m tune.sweep SPACE`: search settings of a config; a parent run in MLflow has one child per trial.

Faults of the space, its config, the data or the resources are reported before a trial starts (exit 2). A sweep whose
trials all failed exits 1. Otherwise the best trial's config is written as `best.yaml`, ready for `jobs.train`. At its
end `tune.report` makes a page of it. A sweep that was killed continues with `--resume`: trials that have ended are not
repeated.
"""

import argparse
import sys

from jobs.cli import CommandParser, main
from tune.load import load_space
from tune.report import add_register_argument, print_registered
from tune.results.listing import describe_plan


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        "tune.sweep",
        "Search settings of a config with Ray Tune; each trial is a whole training run.",
        "python -m tune.sweep tune/spaces/demo.yaml train.epochs=4 search.samples=8",
    )
    parser.add_argument(
        "space", metavar="SPACE", help="a space by name, e.g. demo (tune/spaces/), or a file of your own"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the config, for all trials, or of the search (search.samples)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="must",
        default="no",
        choices=["must", "auto"],
        help="continue the sweep of this name: it must exist, or with =auto it is started if it does not",
    )
    add_register_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="check the space, print the plan, start nothing")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the plan with --dry-run, else run the sweep to its end."""
    space = load_space(args.space, args.overrides)
    if args.dry_run:
        print(describe_plan(space))
        return 0
    from tune.results.register import choose_model_name  # not at the top: each branch imports only its own part
    from tune.trials.check import check_sweep

    if args.register is not None:
        choose_model_name(args.register, space.base)
    checked = check_sweep(space, args.resume)  # wrong input fails before the import below, which takes seconds
    from tune.trials.lock import hold_sweep

    with hold_sweep(checked) as write:
        from tune.results.report import report_at_end
        from tune.trials.whole import sweep

        with report_at_end(checked.space.base.storage):
            sweep(checked, write)
    if args.register is not None:
        print_registered(checked.space.base.storage, args.register)
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
