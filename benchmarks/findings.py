"""`python -m benchmarks.findings`: the paper's findings in small, by real trainings on drawn data.

A unit is one row with one seed: one to two minutes of one core, the long row ten. Each finished unit is a file in
`benchmarks/results/findings/`; units that have one are skipped, so the command can be stopped at any time and started
again. A unit whose settings have changed is trained again, and that is said. Two calls can run beside each other, for
example with other --rows. At the end the tables and plots are made from the files of all rows, missing ones marked,
for docs/findings.md and the README.
"""

import argparse
import itertools
import sys
from pathlib import Path

from benchmarks.miniature.page import update_page
from benchmarks.miniature.results import (
    Recorded,
    changed_settings,
    current_commit,
    identity,
    read_result,
    record,
    write_result,
)
from benchmarks.miniature.rows import GROUPS, ROWS, SEEDS, Row, prepare, units
from benchmarks.miniature.training import restart_with_allocator, train_and_evaluate
from jobs.cli import CommandParser, Parser, main
from pipeline.errors import RunError

RESULTS = Path(__file__).parent / "results" / "findings"
ROOT = Path(__file__).parents[1]


def run_unit(row: Row, seed: int, folder: Path, digests: dict[str, str], results: Path, commit: str) -> bool:
    """Train a unit unless its result stands; whether it was trained.

    Args:
        row: what to train.
        seed: of the run.
        folder: with the shards of both splits and the backbone.
        digests: of the shards and the backbone.
        results: folder of the result files.
        commit: of the code.
    """
    path, config = results / f"{row.name}-seed{seed}.json", row.config(seed, str(folder))
    content = identity(config, digests)
    if path.exists():
        changes = changed_settings(read_result(path), content)
        if not changes:
            print(f"{row.name}, seed {seed}: {path.name} stands, skipped", flush=True)
            return False
        print(f"{row.name}, seed {seed}: trained again, because {'; '.join(changes)}", flush=True)
    outcome = train_and_evaluate(config, lambda line: print(f"{row.name}, seed {seed}: {line}", flush=True))
    write_result(path, record(outcome, content, commit, row=row.name, seed=seed))
    return True


def standing_results(results: Path) -> dict[str, list[Recorded]]:
    """The results of each row by ascending seed; those of other settings than today's are left out."""
    found: dict[str, list[Recorded]] = {name: [] for name in ROWS}
    for name, seed in itertools.product(ROWS, SEEDS):
        path = results / f"{name}-seed{seed}.json"
        if path.exists():
            recorded = read_result(path)
            if not changed_settings(recorded, identity(ROWS[name].config(seed), {})):
                found[name].append(recorded)
    return found


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.findings", __doc__.splitlines()[0], "python -m benchmarks.findings --rows a b")
    titles = ", ".join(f"{name}: {group.title}" for name, group in GROUPS.items())
    parser.add_argument("--rows", nargs="+", choices=GROUPS, default=list(GROUPS), help=f"default all; {titles}")
    parser.add_argument("--page", action="store_true", help="train nothing, make the page from the results there are")
    parser.add_argument("--data", type=Path, default=Path("runs/miniature"), help="drawn images; default %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default benchmarks/results/findings")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with README.md and docs/; default this project")
    return parser


def run(args: argparse.Namespace) -> int:
    """Train what is missing, then make the page. A training that fails does not end the others."""
    failed = False
    standing = standing_results(args.results)  # a damaged file is said before any work
    if not args.page:
        commit, digests = current_commit(), prepare(args.data)
        for row, seed in units(args.rows):
            try:
                run_unit(row, seed, args.data, digests, args.results, commit)
            except RunError as error:
                failed = True
                print(f"{row.name}, seed {seed}: no result, because {error}", file=sys.stderr, flush=True)
        standing = standing_results(args.results)
    for path in update_page(standing, args.root):
        print(f"wrote {path}")
    return int(failed)


if __name__ == "__main__":
    restart_with_allocator("benchmarks.findings")
    sys.exit(main(build_parser(), run))
