"""`python -m benchmarks.inference`: what data, detections and Ray's actors add to the bare model in an evaluation.

Drawn images are evaluated with a preset of random weights, in this process and on actors. Every process takes turns:
the model alone on an image that is in memory, then the next image of the evaluation. So both meet the same other work
on the machine. Processor time of the process counts; images are decoded in another one (`data.workers`). The results
files must have the same bits.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from jobs.cli import CommandParser, Parser, main
from jobs.presets import find_config
from pipeline.checkpoint import Inference, TrainState
from pipeline.config import Config, ScalingConfig, dump, load_config
from pipeline.data.index import load_index
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.engine.cpu_tuning import process_environment
from pipeline.evaluation.detections import concatenate
from pipeline.evaluation.evaluator import evaluation_mode
from pipeline.inference.evaluate import BuildDetection, GroupResult, open_evaluator
from pipeline.inference.pool import run_on_actors
from pipeline.launch.cluster import start_ray
from pipeline.model import build_model

Sample = tuple[float, float]  # processor seconds of an image: the model alone, and its evaluation
SIZE = 640  # of the drawn images, pixels


@dataclass(frozen=True)
class Timed:
    """Work of an actor; with an item's result comes the Sample of the item before, except at the start of a part."""

    build: BuildDetection

    def __call__(self) -> Callable[[range], Iterator[tuple[GroupResult, Sample | None]]]:
        """Build the work and read the images."""
        detect = self.build()
        device = detect.evaluator.runtime.device
        batches = [batch.to(device) for batch in detect.evaluator.loader]

        def work(items: range) -> Iterator[tuple[GroupResult, Sample | None]]:
            results = detect(items)
            begin, last, sample = 0.0, 0.0, None
            for place, item in enumerate(items):
                before = time.process_time()  # what Ray did with the last result is part of that item
                with evaluation_mode(detect.model):
                    detect.model(batches[item].images, batches[item].mask)
                alone = time.process_time() - before
                if place > 1:  # the first item of a process is slower
                    sample = (last, before - begin)
                begin, last = time.process_time(), alone
                yield next(results), sample

        return work


def prepare(folder: Path, args: argparse.Namespace) -> tuple[Config, Inference]:
    """A model of random weights, and shards of drawn images in `folder`."""
    build_shards(*write_synthetic(folder / "drawn", images=args.images, seed=0, size=SIZE), folder / "shards")
    categories = load_index(str(folder / "shards")).categories
    settings = [f"data.val={folder / 'shards'}", f"model.num_classes={len(categories)}", "data.workers=1"]
    config = load_config(find_config(args.preset), [*settings, "model.backbone.weights=none", *args.overrides])
    torch.manual_seed(0)
    model = build_model(config.model, load_backbone=False).eval()
    state = TrainState(dump(config), categories, "", 1, 0, 1, 1)
    return config, Inference(config, categories, model, state)


def build_parser() -> Parser:
    """The command line."""
    example = "python -m benchmarks.inference --workers 1 2"
    parser = CommandParser("benchmarks.inference", (__doc__ or "").splitlines()[0], example)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the preset")
    parser.add_argument("--preset", default="demo", help="preset; default %(default)s")
    parser.add_argument("--images", type=int, default=200, help="images drawn; default %(default)s")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of actors; default 1 2")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config, inference = prepare(Path(folder), args)
        evaluator = open_evaluator(config, inference, "cpu")
        environment = process_environment(config.train, use_gpu=False)
        used = config.model_copy(update={"scaling": ScalingConfig(use_gpu=False)})
        work = Timed(BuildDetection(dump(used), inference.model.state_dict(), evaluator.loader.index.digest))
        groups = len(evaluator.loader.groups)
        ways: dict[str, Iterable[tuple[int, tuple[GroupResult, Sample | None]]]] = {}
        ways["one process"] = enumerate(work()(range(groups)))
        for workers in args.workers:
            size = ScalingConfig(use_gpu=False, num_workers=workers)
            ways[f"{workers} actor{'s' * (workers > 1)}"] = run_on_actors(work, groups, size, environment)
        start_ray()
        digests = set()
        print("| | model alone, ms per image | evaluation, ms per image | share of the model |\n|---|---|---|---|")
        for name, way in ways.items():
            results = dict(way)
            alone, whole = np.array([sample for _, sample in results.values() if sample]).T
            share = statistics.median(alone / whole)
            print(f"| {name} | {1e3 * np.median(alone):.1f} | {1e3 * np.median(whole):.1f} | {share:.0%} |", flush=True)
            found = concatenate(results[item][0][1] for item in range(groups))
            digests.add(found.to_results_json(Path(folder) / "results.json"))
    print(f"results files: {'the same bits' if len(digests) == 1 else 'DIFFERENT'}")
    return 0 if len(digests) == 1 else 1


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
