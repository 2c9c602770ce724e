"""`python -m benchmarks.norm_valid`: the cost of `model.norm_valid` on a padded batch, with and without it in turns.

It measures processor time of forward, losses and backward ("training"), and of forward alone ("evaluation"), on one
thread. The ratio is the median over the turns of with over without, so that a machine that slows down affects both.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from jobs.cli import CommandParser, Parser, main
from pipeline.config import load_config
from pipeline.engine.cpu_tuning import tune_model
from pipeline.model import build_criterion, build_model

PRESET = Path(__file__).parents[1] / "jobs" / "configs" / "demo.yaml"
SIZES = ((160, 213), (160, 200), (150, 190), (160, 180))  # of the demo's images as they are trained
OBJECTS = 5  # per image
WARM_UP = 2  # turns that are not counted


def padded_batch() -> tuple[Tensor, Tensor]:
    """Noise of SIZES, padded right and below, [4, 3, 160, 213], and its mask (True = padding)."""
    height, width = (max(sides) for sides in zip(*SIZES, strict=True))
    images = torch.zeros(len(SIZES), 3, height, width)
    mask = torch.ones(len(SIZES), height, width, dtype=torch.bool)
    for image, padding, (h, w) in zip(images, mask, SIZES, strict=True):
        image[:, :h, :w] = torch.randn(3, h, w)
        padding[:h, :w] = False
    return images, mask


def steps(config_value: str, batch: tuple[Tensor, Tensor]) -> dict[str, Callable[[], object]]:
    """What is timed, of a model with `model.norm_valid` of that value."""
    config = load_config(PRESET, [f"model.norm_valid={config_value}"])
    torch.manual_seed(0)
    model, criterion = build_model(config.model), build_criterion(config.loss)
    tune_model(model, config.train, torch.device("cpu"))
    boxes = torch.rand(len(SIZES), OBJECTS, 4) * 0.3 + 0.2
    labels = torch.arange(OBJECTS) % config.model.classes
    targets = [{"labels": labels, "boxes": box} for box in boxes]
    count = torch.tensor(float(len(SIZES) * OBJECTS))

    def training() -> None:
        model.train().zero_grad()
        criterion.total(criterion(model(*batch), targets, count)).backward()

    @torch.no_grad()
    def evaluation() -> None:
        model.eval()(*batch)

    return {"training": training, "evaluation": evaluation}


def cost(without: Callable[[], object], with_: Callable[[], object], turns: int) -> tuple[float, float]:
    """Median milliseconds of processor time without it, and the median ratio of with over without."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARM_UP + turns):
        for function, taken in zip((without, with_), seconds, strict=True):
            start = time.process_time()
            function()
            taken.append(time.process_time() - start)
    pairs = list(zip(*seconds, strict=True))[WARM_UP:]
    return 1e3 * statistics.median(a for a, _ in pairs), statistics.median(b / a for a, b in pairs)


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.norm_valid", __doc__.splitlines()[0], "python -m benchmarks.norm_valid")
    parser.add_argument("--turns", type=int, default=40, help="counted turns; default %(default)s")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = padded_batch()
    without, with_ = steps("false", batch), steps("true", batch)
    print("| | ms without norm_valid | with over without |")
    print("|---|---|---|")
    for name in without:
        milliseconds, ratio = cost(without[name], with_[name], args.turns)
        print(f"| {name} | {milliseconds:.0f} | {ratio:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
