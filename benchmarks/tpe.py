"""`python -m benchmarks.tpe`: TPE against random search at equal budget, on a table of real trials.

First it records trials: short trainings with random settings, half a minute of one core each, in
`benchmarks/results/tpe_trials.json`. Trials that stand there are skipped, so the command can be stopped and started
again. Then it replays both samplers on the table and writes the result into docs/findings.md.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.miniature.blocks import fill_blocks
from benchmarks.miniature.replay import compare
from benchmarks.miniature.rows import places, prepare
from benchmarks.miniature.search_page import PLOT, search_plot, search_section
from benchmarks.miniature.training import restart_with_allocator, train_and_evaluate
from benchmarks.miniature.trials import read_table, record_trials, trials_of
from jobs.cli import CommandParser, Parser, main
from pipeline.errors import ConfigError
from tune.load import load_space

SPACE = Path(__file__).parent / "miniature" / "tpe_space.yaml"
TABLE = Path(__file__).parent / "results" / "tpe_trials.json"
ROOT = Path(__file__).parents[1]


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.tpe", __doc__.splitlines()[0], "python -m benchmarks.tpe --trials 64")
    parser.add_argument("--trials", type=int, default=64, help="in the table at least; default %(default)s")
    parser.add_argument("--seeds", type=int, default=20, help="searches of each sampler; default %(default)s")
    parser.add_argument("--page", action="store_true", help="record nothing, replay on the trials there are")
    parser.add_argument("--data", type=Path, default=Path("runs/miniature"), help="drawn images; default %(default)s")
    parser.add_argument("--table", type=Path, default=TABLE, help="default benchmarks/results/tpe_trials.json")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with docs/; default this project")
    return parser


def run(args: argparse.Namespace) -> int:
    """Record what is missing, replay, make the page."""
    if args.trials < 1 or args.seeds < 2:
        raise ConfigError("--trials needs 1 or more, --seeds 2 or more, because the page shows a spread")
    table = read_table(args.table)
    space = load_space(SPACE, [f"{key}={value}" for key, value in places(str(args.data)).items()])
    if not args.page:
        digests = prepare(args.data)
        table = record_trials(space, digests, args.table, args.trials, train_and_evaluate, _say)
    trials = trials_of(space, table)
    first = space.search.seed + 1  # the table has the values that random search draws with the space's own seed
    comparison = (
        compare(space, trials, range(first, first + args.seeds)) if len(trials) >= (space.points or 0) else None
    )
    section = search_section(trials, comparison, args.seeds)
    fill_blocks(args.root / "docs" / "findings.md", {"search": section})
    if comparison:
        search_plot(comparison, trials, args.root / "docs" / PLOT)
    print(section)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    restart_with_allocator("benchmarks.tpe")
    sys.exit(main(build_parser(), run))
