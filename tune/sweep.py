"""`python -m tune.sweep SPACE`: search settings of a config; a parent run in MLflow has one child per trial.

Faults of the space, its config, the data or the resources are reported before a trial starts (exit 2). A sweep whose
trials all failed exits 1. Otherwise the best trial's config is written as `best.yaml`, ready for `jobs.train`.
"""

import argparse
import sys

from jobs.cli import CommandParser, main
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.run import finish_run, start_run
from tune import report
from tune.load import load_space
from tune.space import Space


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
    parser.add_argument("--dry-run", action="store_true", help="check the space, print the plan, start nothing")
    return parser


def run(args: argparse.Namespace) -> int:
    """Load, check, run, report."""
    space = load_space(args.space, args.overrides)
    if args.dry_run:
        print(report.plan(space))
        return 0
    sweep(space)
    return 0


def sweep(space: Space) -> None:
    """Run the sweep, write the best config into its folder. Raises InputError before, SweepError after the trials."""
    from tune.trials import prepare, run_trials  # not at the top, because it loads Ray

    prepared = prepare(space)
    config, folder = prepared.base, prepared.base.storage
    run_id = start_run(config.tracking, config, config.name, tags={"sweep": space.search.model_dump_json()})
    status = "FAILED"
    try:
        outcomes = run_trials(prepared, run_id)
        listing = report.table(prepared, outcomes)
        print(f"\n{listing}")
        interrupted = any(outcome.status == "interrupted" for outcome in outcomes)
        status = "KILLED" if interrupted else status
        if interrupted and all(outcome.score is None for outcome in outcomes):
            raise KeyboardInterrupt  # Ray handled the signal and ended the trials; the exit code must show it
        winner = report.best(outcomes)
        path = report.write_best(space, winner, folder)
        print(f"\nbest: {winner.name}, {space.search.metric} {winner.score:.4f}")
        print(f"train it in full: python -m jobs.train {path}")
        with RunLogger(config.tracking.uri, run_id) as logger:
            logger.metrics({space.search.metric: winner.score or 0.0}, step=winner.epochs)
            logger.text(listing, "trials.txt")
            logger.text(report.best_config(space, winner), "best.yaml")
        if interrupted:
            raise KeyboardInterrupt
        status = "FINISHED"
    finally:
        finish_run(config.tracking.uri, run_id, status)


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
