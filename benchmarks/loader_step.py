"""`python -m benchmarks.loader_step`: a training step fed by the loader, and by the same batches from memory, in turns.

One process of one thread trains the demo (160 px) and r50_deformable (480x640) on drawn images. The loader, with each
number of `data.workers`, and a list of the batches that it makes feed the same model. They take turns of some steps, so
that what else goes on in the machine hits all alike. Printed: the median over turns of the time with the loader over
that from memory, its quartiles, and the same of the processor time of training process and workers together.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.data_chunks import running_ms
from jobs.cli import CommandParser, Parser, main
from pipeline.config import Config, load_config
from pipeline.data.batch import Batch
from pipeline.data.loader import TrainLoader
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import CATEGORIES, write_synthetic
from pipeline.data.worker_pool import WorkerPool
from pipeline.engine.backend import PlainBackend
from pipeline.engine.cpu_tuning import KEEP_FREED_MEMORY, tune_model
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine
from pipeline.model import build_criterion, build_model
from pipeline.runtime import single

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
MEMORY, WORKERS = "memory", ("0", "1", "2")  # what feeds the steps: a list, or a loader with so many processes
TIMES = ("wall", "CPU")
CASES: dict[str, tuple[int, int, list[str]]] = {  # side of the drawn images, steps of a turn, settings
    "demo": (213, 10, []),
    "r50_deformable": (
        640,
        1,
        ["train.global_batch=1", "train.micro_batch=1", "data.augment.scales=[480]", "data.augment.max_size=640",
         "data.augment.crop=0", "model.backbone.weights=none", f"model.num_classes={len(CATEGORIES)}"],
    ),
}  # fmt: skip


class Loop:
    """A model and what feeds it."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(0)
        module = LossModule(build_model(config.model), build_criterion(config.loss))
        runtime = single()
        tune_model(module.model, config.train, runtime.device)
        self._engine = Engine(module, PlainBackend(module, config.optim, runtime.device), runtime, seed=0)
        self._pools = {name: WorkerPool(int(name)) for name in WORKERS}
        loaders = {
            name: TrainLoader(config.data, config.train, config.seed, 0, 1, pool) for name, pool in self._pools.items()
        }
        batches = list(loaders["0"].epoch(0))
        self._steps: dict[str, Iterator[list[Batch]]] = {MEMORY: itertools.cycle(batches)}
        for name, loader in loaders.items():  # the same epoch again and again, so that all work on the same
            self._steps[name] = itertools.chain.from_iterable(map(loader.epoch, itertools.repeat(0)))

    def turn(self, name: str, steps: int) -> tuple[float, float]:
        """Wall and processor seconds of a step."""
        processes = [os.getpid(), *(self._pools[name].processes() if name in self._pools else ())]
        before, start = sum(map(running_ms, processes)), time.perf_counter()
        for batches in itertools.islice(self._steps[name], steps):
            self._engine.train_step(batches, 0)
        wall = time.perf_counter() - start
        return wall / steps, (sum(map(running_ms, processes)) - before) / 1e3 / steps


def measure(config: Config, steps: int, turns: int) -> dict[str, Any]:
    """Seconds of a step from memory, and what it takes with each loader over that. The first turns warm up."""
    loop, names = Loop(config), (MEMORY, *WORKERS)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(turns + 1):
        for name in names[:: 1 if turn % 2 else -1]:
            times[name].append(loop.turn(name, steps))
    found: dict[str, Any] = {"seconds": statistics.median(wall for wall, _ in times[MEMORY][1:])}
    for name in WORKERS:
        pairs = list(zip(times[MEMORY], times[name], strict=True))[1:]
        ratios = {what: [loaded[at] / kept[at] for kept, loaded in pairs] for at, what in enumerate(TIMES)}
        found[name] = {what: statistics.quantiles(values, n=4) for what, values in ratios.items()}
    return found


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.loader_step", __doc__.splitlines()[0], "python -m benchmarks.loader_step")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default %(default)s")
    parser.add_argument("--turns", type=int, default=10, help="of each; default %(default)s")
    parser.add_argument("--steps", type=int, help="of a turn; default 10 for the demo, 1 for r50_deformable")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    torch.set_num_threads(1)
    print("| case | s per step from memory | data.workers | over it, wall (quartiles) | over it, CPU (quartiles) |")
    print("|---|---|---|---|---|")
    results = {}
    for case in args.cases:
        side, steps, settings = CASES[case]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            build_shards(*write_synthetic(folder / "drawn", images=96, seed=0, size=side), folder / "shards")
            config = load_config(CONFIGS / f"{case}.yaml", [*settings, f"data.train={folder / 'shards'}"])
            found = results[case] = measure(config, args.steps or steps, args.turns)
        for workers in WORKERS:
            cells = [f"{middle:.3f} ({low:.3f} to {high:.3f})" for low, middle, high in found[workers].values()]
            print(f"| {' | '.join([case, format(found['seconds'], '.3f'), workers, *cells])} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # as a worker on the CPU is started
        command = [sys.executable, "-m", "benchmarks.loader_step", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEP_FREED_MEMORY})
    sys.exit(main(build_parser(), run))
