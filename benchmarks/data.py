"""`python -m benchmarks.data SHARDS`: the loader against a bare decode and augment loop, and against CocoDetection.

Every variant reads the same images (those of SHARDS, `--repeat` times) with the same number of processes; rounds are
interleaved. The best round of each is shown, and the median of the rounds' ratios. The bare loop opens, decodes and
augments until it has arrays, and passes nothing on. CocoDetection is torchvision's, with the published augmentation,
float pixels and padding in its workers. The clock starts at the first batch, whose latency is printed separately,
because it would dominate an epoch of so few images. Then one process of each variant processes the same views in
short turns, which compares them on a machine with other load. The share of padding and the memory per process over
epochs are printed, too.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader

from benchmarks.data_chunks import chunk_by_chunk
from benchmarks.data_peers import Bare, Coco, Copy, Loaded, copy_out, options, pad
from jobs.cli import CommandParser, Parser, main
from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.data.dataset import DetectionDataset
from pipeline.data.loader import TrainLoader
from pipeline.data.plan import train_plan
from pipeline.data.transforms import draw_views
from pipeline.engine.cpu_tuning import KEEP_FREED_MEMORY

EPOCHS = 5  # of the memory check
MODES = ("reference", "fused")  # values of data.augment.resample


class Variant(Protocol):
    """Something that works through all images once."""

    def run(self, epoch: int) -> Iterator[int]:
        """Work through an epoch; yields the number of images whenever some are ready."""

    def processes(self) -> list[int]:
        """Ids of its processes besides this one."""


class Ours:
    """TrainLoader with an `augment.resample`."""

    def __init__(self, copy: Copy, mode: str, workers: int, micro_batch: int) -> None:
        config = DataConfig(train=str(copy.shards), workers=workers, augment=AugmentConfig(resample=mode))
        train = TrainConfig(global_batch=8 * micro_batch, micro_batch=micro_batch)
        self.loader = TrainLoader(config, train, 0, 0, 1)

    def run(self, epoch: int) -> Iterator[int]:
        """One epoch."""
        return (sum(map(len, step)) for step in self.loader.epoch(epoch))

    def processes(self) -> list[int]:
        """The pool's."""
        return self.loader.pool.processes()


@dataclass
class Measured:
    """What the rounds of a variant came to."""

    images_per_s: list[float] = field(default_factory=list)
    worker_ms: list[float] = field(default_factory=list)  # processor time of the processes per image
    own_ms: list[float] = field(default_factory=list)  # and of this one
    memory_mib: list[float] = field(default_factory=list)  # of the largest process, after the round

    def add(self, variant: Variant, epoch: int) -> None:
        """One round."""
        before, own = _cpu(variant.processes()), time.process_time()
        counts = variant.run(epoch)
        first, start = next(counts), time.perf_counter()
        images = sum(counts)
        self.images_per_s.append(images / (time.perf_counter() - start))
        images += first
        self.own_ms.append(1e3 * (time.process_time() - own) / images)
        self.worker_ms.append(1e3 * (_cpu(variant.processes()) - before) / images)
        self.memory_mib.append(max(_private_mib(pid) for pid in variant.processes()))


def _cpu(processes: Iterable[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in processes]
    return float(sum(spent.user + spent.system for spent in times))


def _private_mib(pid: int) -> float:
    return float(psutil.Process(pid).memory_full_info().uss) / 2**20


def speed(copy: Copy, workers: int, micro_batch: int, rounds: int) -> dict[str, Measured]:
    """All variants with the same number of processes."""
    variants: dict[str, Variant] = {}
    data = DetectionDataset(str(copy.shards))
    for mode in MODES:
        loop: Any = Bare(copy, data, AugmentConfig(resample=mode))
        variants[f"bare {mode}"] = Loaded(DataLoader(loop, batch_size=None, **options(workers)))
        variants[f"loader {mode}"] = Ours(copy, mode, workers, micro_batch)
    views = draw_views(data.index.sizes(), 0, 0, AugmentConfig())
    for name, as_float in (("CocoDetection", True), ("CocoDetection, uint8", False)):
        coco: Any = Coco(copy, [views[i] for i in range(len(views))], as_float)
        batches: dict[str, Any] = {"batch_size": micro_batch, "shuffle": True, "collate_fn": pad, "drop_last": True}
        variants[name] = Loaded(DataLoader(coco, **batches, **options(workers)))
    measured = {name: Measured() for name in variants}
    for variant in variants.values():
        sum(variant.run(0))
    for epoch in range(1, rounds + 1):
        for name, variant in variants.items():
            measured[name].add(variant, epoch)
    return measured


def padding(data: DetectionDataset, micro_batch: int, epochs: int = 8) -> tuple[float, float]:
    """Share of padding in the pixels of an epoch of at least 2,048 samples: groups at random, and as planned."""
    copies = -(-2048 // len(data))
    sizes = np.tile(data.index.sizes(), (copies, 1))
    shares = []
    for window in (1, DataConfig().window):
        real = padded = 0
        for epoch in range(epochs):
            seen = draw_views(sizes, 0, epoch, AugmentConfig()).out_size
            plan = train_plan(
                seen,
                np.tile(data.index.samples.shard, copies),
                digest=data.index.digest,
                seed=0,
                epoch=epoch,
                micro_batch=micro_batch,
                global_batch=micro_batch if window == 1 else 8 * micro_batch,
                mix_shards=DataConfig().mix_shards,
                window=window,
                tail="drop",
            )
            real += seen[plan].prod(axis=-1).sum()
            padded += micro_batch * seen[plan].max(axis=2).prod(axis=-1).sum()
        shares.append(float(1 - real / padded))
    return shares[0], shares[1]


def first_batch(shards: Path, workers: int) -> tuple[float, float]:
    """Seconds to the first batch of a new loader, and of a later epoch."""
    start = time.perf_counter()
    loader = TrainLoader(DataConfig(train=str(shards), workers=workers), TrainConfig(global_batch=8), 0, 0, 1)
    next(loader.epoch(0))
    new, start = time.perf_counter() - start, time.perf_counter()
    next(loader.epoch(1))
    return new, time.perf_counter() - start


def _row(workers: int, name: str, found: Measured, measured: dict[str, Measured]) -> str:
    """A line of the table. `by CPU` estimates `of bare` for a machine where every process has its own core."""
    of_bare = ["", ""]
    peer = measured.get(name.replace("loader", "bare"), found)
    if peer is not found:
        share, by_cpu = _ratio(found.images_per_s, peer.images_per_s), _ratio(peer.worker_ms, found.worker_ms)
        of_bare = [f"{share:.0%}", f"{by_cpu:.0%}"]
    over = f"{_ratio(found.images_per_s, measured['CocoDetection'].images_per_s):.2f}"
    spent = f"{min(found.worker_ms):.2f} + {min(found.own_ms):.2f}"
    return f"| {' | '.join([str(workers), name, f'{max(found.images_per_s):.0f}', spent, *of_bare, over])} |"


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.data", __doc__.splitlines()[0], "python -m benchmarks.data shards/train")
    parser.add_argument("shards", metavar="SHARDS", help="folder written by jobs.shard build, or its URL")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="default %(default)s")
    parser.add_argument("--micro-batch", type=int, default=2, help="images per group; default %(default)s")
    parser.add_argument("--repeat", type=int, default=4, help="copies of the images; default %(default)s")
    parser.add_argument("--rounds", type=int, default=EPOCHS, help="of each variant; default %(default)s")
    parser.add_argument("--turns", type=int, default=8, help="of each at a chunk; default %(default)s")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    torch.set_num_threads(1)
    source = DetectionDataset(args.shards)
    results: dict[str, Any] = {"images": len(source) * args.repeat, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_out(source, Path(folder), args.repeat)
        new, later = first_batch(copy.shards, max(args.workers))
        print(f"first batch: {new:.2f} s with new processes, {later:.2f} s in a later epoch\n")
        results["first_batch_s"] = {"new": new, "later": later}
        print(
            "| processes | variant | images/s | CPU ms/image, processes + own | of bare | by CPU | over CocoDetection |"
        )
        print("|---|---|---|---|---|---|---|")
        for workers in args.workers:
            measured = speed(copy, workers, args.micro_batch, args.rounds)
            for name, found in measured.items():
                print(_row(workers, name, found, measured), flush=True)
            results[f"workers_{workers}"] = {name: dataclasses.asdict(found) for name, found in measured.items()}
        for mode in MODES:
            alone, loaded = chunk_by_chunk(copy, mode, args.micro_batch, args.turns)
            results[f"chunks_{mode}"] = {"bare_ms": alone, "loader_ms": loaded}
            share = f"{alone / loaded:.0%} of the bare loop"
            print(f"chunk by chunk, {mode}: {alone:.2f} and {loaded:.2f} ms per image, {share}", flush=True)
        for mode in MODES:
            memory = [round(mib) for mib in measured[f"loader {mode}"].memory_mib]
            print(f"private memory of a process after each of {len(memory)} epochs, {mode}, MiB: {memory}")
    for size in (2, 4, 8):
        random, grouped = padding(source, size)
        results[f"padding_{size}"] = {"random": random, "grouped": grouped}
        print(f"padding at groups of {size}: {random:.1%} in random order, {grouped:.1%} as planned")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # the loader's process is a Ray worker, started with them
        command = [sys.executable, "-m", "benchmarks.data", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEP_FREED_MEMORY})
    sys.exit(main(build_parser(), run))
