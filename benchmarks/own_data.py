"""`python -m benchmarks.own_data`: does it help on own data? Weights, augmentation and balance against none, measured.

Two drawn data sets, one with rare classes and one of few images; three seeds of each row. A unit is one short training
on one thread, in equal steps; few images are also trained in four times as many. Each finished unit is a file in
`benchmarks/results/own_data/` and is skipped from then on, so the command can be stopped at any time and started
again. The table in docs/own_data.md is made from the files.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.miniature.results import (
    Recorded,
    changed_settings,
    current_commit,
    identity,
    read_result,
    record,
    write_result,
)
from benchmarks.miniature.training import BASE, DIGITS, restart_with_allocator, train_and_evaluate
from benchmarks.own_data_sets import PLAIN, SETS, DataSet
from benchmarks.own_data_table import update_page
from jobs.cli import CommandParser, Parser, main
from pipeline import checkpoint
from pipeline.checkpoint import TrainState
from pipeline.config import Config, dump, load_config
from pipeline.data.balance import epoch_length, read_factors
from pipeline.data.index import load_index
from pipeline.evaluation.class_table import class_scores
from pipeline.evaluation.evaluator import Result
from pipeline.model.detector import Detector

RESULTS = Path(__file__).parent / "results" / "own_data"
PAGE = Path(__file__).parents[1] / "docs" / "own_data.md"
SEEDS = (0, 1, 2)
STEPS = 400  # of each unit, but for the long rows
LONG = 4  # times as many
START = "start"  # the unit that trains the start weights
# The published augmentation at the size of these images; `small` and `strong` are added to it.
SMALL_IMAGES = {
    "data.augment.scales": [104, 112, 120, 128, 136],
    "data.augment.max_size": 171,
    "data.augment.eval_size": 128,
    "data.augment.crop": 0.5,
    "data.augment.crop_scales": [96, 112, 128],
    "data.augment.crop_range": [80, 128],
    "train.eval_epochs": 1000,  # only the last weights count
    "train.global_batch": 8,
    "train.micro_batch": 8,
}


@dataclass(frozen=True)
class Row:
    """One way to train on a data set."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fine_tuned: bool = True
    sets: tuple[str, ...] = tuple(SETS)
    times: int = 1  # as many steps


ROWS = (
    Row("published"),
    Row("nothing", fine_tuned=False),
    Row("none", {"data.augment.preset": "none"}),
    Row("small", {"data.augment.preset": "small"}),
    Row("balance", {"data.balance": 0.3}, sets=("rare",)),
    Row("strong", {"data.augment.preset": "strong"}),
    Row("long", sets=("few",), times=LONG),
    Row("long_small", {"data.augment.preset": "small"}, sets=("few",), times=LONG),
    Row("long_strong", {"data.augment.preset": "strong"}, sets=("few",), times=LONG),
)


def config_of(row: Row, drawn: DataSet, seed: int, folder: Path, start: Path) -> Config:
    """The config of a unit: its steps, to the nearest whole epoch, with the drop of the rate at three quarters."""
    settings = {
        **SMALL_IMAGES,
        **row.settings,
        "data.train": f"{folder}/train",
        "data.val": f"{folder}/val",
        "model.num_classes": len(drawn.classes),
        "model.init_from": str(start) if row.fine_tuned else "",
        "seed": seed,
    }
    config = load_config(BASE, settings)
    samples = epoch_length(read_factors(config.data)) if config.data.balance else len(load_index(config.data.train))
    epochs = max(1, round(STEPS * row.times * config.train.global_batch / samples))
    return load_config(BASE, {**settings, "train.epochs": epochs, "optim.drop_epochs": [max(1, epochs * 3 // 4)]})


def run_unit(row: Row, name: str, seed: int, place: Path, results: Path, start: Path, commit: str) -> None:
    """Train a unit unless its result stands.

    Args:
        row: what to train.
        name: of the data set.
        seed: of the run.
        place: folder of all drawn data.
        results: folder of the result files.
        start: checkpoint folder with the start weights.
        commit: of this code.
    """
    drawn, path = SETS[name], results / f"{name}-{row.name}-seed{seed}.json"
    digests = drawn.draw(place / name)
    config = config_of(row, drawn, seed, place / name, start)
    plain = config.model_copy(update={"model": config.model.model_copy(update={"init_from": ""})})
    content = identity(plain, digests)
    if row.fine_tuned:
        content["start weights"] = read_result(results / f"{START}.json")["digest"]
    if not stands(path, content):
        rare: dict[str, float] = {}

        def finish(_: Detector, result: Result) -> None:
            names = {category.id: category.name for category in load_index(config.data.val).categories}
            scores = class_scores(result.scores, names)
            own = [each.AP for each in scores if each.name in drawn.rare]
            rare["AP_rare"] = round(sum(own) / max(1, len(own)), DIGITS)

        outcome = train_and_evaluate(config, speaker(path.stem), finish)
        names = {"row": row.name, "set": name, "seed": seed, **(rare if drawn.rare else {})}
        write_result(path, record(outcome, content, commit, **names))


def train_start(place: Path, results: Path, start: Path, commit: str) -> None:
    """Train the start weights on the plain data set, unless they are there."""
    digests, path = PLAIN.draw(place / "plain"), results / f"{START}.json"
    config = load_config(BASE, {"data.train": f"{place}/plain/train", "data.val": f"{place}/plain/val"})
    content = identity(config, digests)
    if stands(path, content) and (start / "state.json").exists():
        return

    def finish(model: Detector, _: Result) -> None:
        index = load_index(config.data.train)
        state = TrainState(dump(config), index.categories, index.digest, 0, 0, 0, 0)
        checkpoint.save(start, state, model.state_dict(), {})

    write_result(path, record(train_and_evaluate(config, speaker(START), finish), content, commit, row=START))


def stands(path: Path, content: dict[str, Any]) -> bool:
    """Whether a result is there and counts; what has changed is said."""
    if not path.exists():
        return False
    changes = changed_settings(read_result(path), content)
    print(
        f"{path.stem}: trained again, {'; '.join(changes)}" if changes else f"{path.stem}: stands, skipped", flush=True
    )
    return not changes


def speaker(name: str) -> Any:
    """A function that prints a line with the name of its unit."""
    return lambda line: print(f"{name}: {line}", flush=True)


def standing_results(results: Path) -> list[Recorded]:
    """The results of all units of ROWS that are there."""
    paths = [results / f"{name}-{row.name}-seed{seed}.json" for name in SETS for row in ROWS for seed in SEEDS]
    return [read_result(path) for path in paths if path.exists()]


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.own_data", __doc__.splitlines()[0], "python -m benchmarks.own_data")
    parser.add_argument("--page", action="store_true", help="train nothing, make the table from the results there are")
    parser.add_argument("--data", type=Path, default=Path("runs/own_data"), help="drawn images; default %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default benchmarks/results/own_data")
    parser.add_argument("--out", type=Path, default=PAGE, help="page that has the table; default docs/own_data.md")
    return parser


def run(args: argparse.Namespace) -> int:
    """Train what is missing, one seed of all rows before the next, then make the table."""
    if not args.page:
        start, commit = args.data / "weights", current_commit()  # now: a pull while this runs changes it
        train_start(args.data, args.results, start, commit)
        for seed in SEEDS:
            for row in ROWS:
                for name in row.sets:
                    run_unit(row, name, seed, args.data, args.results, start, commit)
    update_page(standing_results(args.results), args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    restart_with_allocator("benchmarks.own_data")
    sys.exit(main(build_parser(), run))
