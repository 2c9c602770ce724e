"""`python -m benchmarks.prediction`: what files, detections and Ray's actors add to the bare model in `jobs.predict`.

Measured is the way from drawn image files to the results file, with a preset of random weights, in this process and on
actors. Each image keeps 100 detections. The model alone gets tensors of the same sizes.

The share in processor time is taken in turns: each process runs the model alone on an image's size, then predicts on
the next image. So both meet the same other work on the machine. A prediction's time is that of all threads of its
processes, the driver's included. The share by the clock compares images per second with those of the model alone on as
many processes, one after the other; it is the median of the rounds. Starting and loading are left out of both. The
results files must have the same bits.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks.inference import prepare
from jobs.cli import CommandParser, Parser, main
from pipeline.config import ScalingConfig
from pipeline.data.batch import Batch, collate
from pipeline.data.index import Category
from pipeline.engine.cpu_tuning import process_environment
from pipeline.errors import ConfigError
from pipeline.inference.image_sources import ImageSource, list_images, number_images
from pipeline.inference.pool import run_on_actors
from pipeline.inference.predict_images import BuildPrediction, ImageWork, PredictImages, make_options
from pipeline.inference.prediction_output import write_results
from pipeline.inference.prediction_parts import PartFolder, Row
from pipeline.inference.predictor import read_image
from pipeline.launch.cluster import start_ray
from pipeline.model.weights.files import file_digest

What = Literal["turns", "prediction", "model"]
TOP_K = 100


@dataclass(frozen=True)
class Sample:
    """An image's processor seconds in the process that had it."""

    process: int
    alone: float  # of the model alone
    whole: float  # of everything else since the image before


Timed = tuple[Row, Sample]


@dataclass(frozen=True)
class BuildTimed:
    """Makes the work of a process: the model alone and the prediction in turns, or one of them."""

    build: BuildPrediction
    what: What

    def __call__(self) -> Callable[[range], Iterator[Timed]]:
        """Build the model; for the model alone also the tensors."""
        predict = self.build()
        batches = None if self.what == "prediction" else sized_batches(predict)
        last = time.process_time()

        def work(items: range) -> Iterator[Timed]:
            nonlocal last
            rows = None if self.what == "model" else predict(items)
            for item in items:
                alone = run_model(predict, batches[item]) if batches else 0.0
                row = next(rows) if rows else {}
                now = time.process_time()
                sample = Sample(os.getpid(), alone, now - last - alone)
                last = now  # what Ray does with this result is part of the next image
                yield row, sample

        return work


def sized_batches(predict: PredictImages) -> list[Batch]:
    """For each image a batch of its size, which images of equal size share; the model has seen one of them."""
    shared: dict[tuple[int, int], Batch] = {}
    batches = []
    for image in predict.images:
        item = predict.predictor.prepare(read_image(image.source.read()))
        if item.extent not in shared:
            shared[item.extent] = collate([item], 0, 1.0).to(torch.device("cpu"))
        batches.append(shared[item.extent])
    run_model(predict, batches[0])  # the first run of a process is slower
    return batches


@torch.no_grad()
def run_model(predict: PredictImages, batch: Batch) -> float:
    """The processor seconds of this thread, which is the only one that computes."""
    before = time.thread_time()
    predict.predictor._model(batch.images, batch.mask)
    return time.thread_time() - before


@dataclass(frozen=True)
class Measured:
    """A pass over all images."""

    alone: float  # processor seconds of the model alone
    whole: float  # processor seconds of the prediction, in all processes
    rate: float  # images per second by the clock, after the first result of every process
    digest: str  # of the results file; empty for the model alone


def measure(
    results: Iterable[tuple[int, Timed]], processes: int, images: Sequence[ImageSource], save: "Save | None"
) -> Measured:
    """Run a pass: take the results, and save them as `jobs.predict` does.

    Args:
        results: of `BuildTimed`, by the image's number.
        processes: number of actors; 0 for this process.
        images: all of them.
        save: None for the model alone.

    Raises:
        ConfigError: no image is left after the first one of every process.
    """
    samples: list[Sample] = []
    seen: set[int] = set()
    digest, counted, since, own = "", 0, time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as folder, PartFolder(Path(folder) / "parts", "", len(images)) as parts:
        for item, (row, sample) in results:
            samples.append(sample)
            if len(samples) == 1:  # what came before was the start
                own = time.process_time()
            if sample.process not in seen:
                seen.add(sample.process)
                counted, since = len(samples), time.monotonic()
            if save is not None:
                parts.add(item, row)
        if not processes:  # the samples have all of the time until here
            own = time.process_time()
        if save is not None:
            digest = save(Path(folder) / "found.json", parts)
        own, seconds = time.process_time() - own, time.monotonic() - since
    if len(samples) == counted:
        raise ConfigError(f"{len(images)} images are too few to time {max(1, processes)} processes; raise --images")
    alone, whole = sum(sample.alone for sample in samples), sum(sample.whole for sample in samples)
    return Measured(alone, whole + own, (len(samples) - counted) / seconds, digest)


@dataclass(frozen=True)
class Save:
    """Writes the results of all images."""

    images: Sequence[ImageSource]
    categories: Sequence[Category]

    def __call__(self, out: Path, parts: PartFolder) -> str:
        """Write them; returns the digest of the results file."""
        names = [image.name for image in self.images]
        write_results(out, parts.rows(), names, number_images(self.images), self.categories)
        parts.remove()
        return file_digest(out)


def build_parser() -> Parser:
    """The command line."""
    example = "python -m benchmarks.prediction --workers 1 2"
    parser = CommandParser("benchmarks.prediction", (__doc__ or "").splitlines()[0], example)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the preset")
    parser.add_argument("--preset", default="demo", help="preset; default %(default)s")
    parser.add_argument("--images", type=int, default=200, help="images drawn; default %(default)s")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of actors; default 1 2")
    parser.add_argument("--rounds", type=int, default=3, help="passes by the clock; default %(default)s")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config, inference = prepare(Path(folder), args)
        images = list_images([str(Path(folder) / "drawn" / "images")])
        inference = replace(inference, config=config.model_copy(update={"scaling": ScalingConfig(use_gpu=False)}))
        works = tuple(ImageWork(image) for image in images)
        build = BuildPrediction.of(inference, works, make_options(0.0, TOP_K, "apply"))
        environment = process_environment(config.train, use_gpu=False)
        save = Save(images, inference.categories)
        if args.workers:
            start_ray()

        def run_pass(what: What, workers: int) -> Measured:
            timed, size = BuildTimed(build, what), ScalingConfig(use_gpu=False, num_workers=max(1, workers))
            results = run_on_actors(timed, len(images), size, environment) if workers else _here(timed, len(images))
            return measure(results, workers, images, None if what == "model" else save)

        digests = set()
        print("| | model alone, ms | prediction, ms | share | images/s | model alone, images/s | share by the clock |")
        print("|---|---|---|---|---|---|---|")
        for workers in [0, *args.workers]:
            turns = run_pass("turns", workers)
            rounds = [(run_pass("prediction", workers), run_pass("model", workers)) for _ in range(max(1, args.rounds))]
            digests |= {turns.digest, *(whole.digest for whole, _ in rounds)}
            name = f"{workers} actor{'s' * (workers > 1)}" if workers else "one process"
            numbers = [f"{1e3 * seconds / len(images):.1f}" for seconds in (turns.alone, turns.whole)]
            numbers.append(f"{turns.alone / turns.whole:.0%}")
            numbers += [
                f"{statistics.median(each.rate for each in column):.3g}" for column in zip(*rounds, strict=True)
            ]
            shares = [whole.rate / alone.rate for whole, alone in rounds]
            numbers.append(f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})")
            print(f"| {name} | {' | '.join(numbers)} |", flush=True)
    print(f"results files: {'the same bits' if len(digests) == 1 else 'DIFFERENT'}")
    return 0 if len(digests) == 1 else 1


def _here(build: BuildTimed, items: int) -> Iterator[tuple[int, Timed]]:
    yield from enumerate(build()(range(items)))


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
