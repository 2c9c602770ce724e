"""`python -m benchmarks.op`: the operator's kernels against the grid_sample reference, same tensors, threads and run.

Prints the best time of forward and backward and the ratio per size, for points near their own query ("local", as a
trained encoder samples) and anywhere ("uniform").
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.cli import CommandParser, Parser, main
from pipeline.csrc import build
from pipeline.model import ops

HEADS, POINTS = 8, 4


@dataclass(frozen=True)
class Case:
    """One size: levels, channels per head, images; `queries` None = one per pixel, as in the encoder."""

    name: str
    shapes: Sequence[tuple[int, int]]
    channels: int
    batch: int
    queries: int | None = None


CASES = (
    Case("demo encoder", [(20, 20), (10, 10), (5, 5)], 16, 4),
    Case("encoder 320x320", [(40, 40), (20, 20), (10, 10), (5, 5)], 32, 2),
    Case("decoder 640x640", [(80, 80), (40, 40), (20, 20), (10, 10)], 32, 2, 300),
    Case("encoder 640x640", [(80, 80), (40, 40), (20, 20), (10, 10)], 32, 1),
)
LARGE = Case("encoder 800x1333", [(100, 167), (50, 84), (25, 42), (13, 21)], 32, 1)


def grid(height: int, width: int) -> Tensor:
    """[height * width, 2] centres (x, y) of the pixels of a map, row by row, in [0, 1]."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def inputs(case: Case, local: bool, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations, weights. Local points lie 3 pixels (standard deviation) around their query's centre."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.cat([grid(height, width) for height, width in case.shapes])
    pixels = len(centres)
    if case.queries:
        centres = torch.rand(case.queries, 2, generator=generator)
    outer = (case.batch, len(centres), HEADS, len(case.shapes), POINTS)
    locations = torch.rand(*outer, 2, generator=generator)
    if local:
        sizes = torch.tensor([[w, h] for h, w in case.shapes])[:, None]
        locations = centres[:, None, None, None] + 3 * torch.randn(*outer, 2, generator=generator) / sizes
    value = torch.randn(case.batch, pixels, HEADS, case.channels, generator=generator).to(dtype)
    weights = torch.randn(outer, generator=generator).flatten(-2).softmax(-1).view(outer)
    leaves = [tensor.to(device).requires_grad_() for tensor in (value, locations, weights)]
    return leaves[0], leaves[1], leaves[2]


def now(device: str) -> float:
    """Seconds, after all work on `device` is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(case: Case, local: bool, device: str, dtype: torch.dtype, repeats: int) -> list[float]:
    """Best seconds of the kernel's forward and backward, then of the reference's."""
    value, locations, weights = inputs(case, local, device, dtype)
    best: list[float] = []
    for impl, times in ((device, 5 * repeats), ("torch", repeats)):
        forward, backward = [], []
        for _ in range(times + 1):  # the first one warms up
            start = now(device)
            output = ops.ms_deform_attn(value, case.shapes, locations, weights, impl=impl)
            forward.append(now(device) - start)
            grad = torch.ones_like(output)
            start = now(device)
            torch.autograd.grad(output, (value, locations, weights), grad)
            backward.append(now(device) - start)
        best += [min(forward[1:]), min(backward[1:])]
    return best


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.op", __doc__.splitlines()[0], "python -m benchmarks.op --threads 2 --large")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of value")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=2, help="of the reference; the kernels get five times as many")
    parser.add_argument("--large", action="store_true", help="also 800x1333 (2 GB and half a minute for the reference)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(args.threads)
    what = f"{args.device}, {args.dtype}, torch {torch.__version__}"
    if args.device == "cpu":
        what += f", {build.instruction_set()}, {args.threads} threads"
    print(f"{what}; milliseconds, and grid_sample's time over the kernel's\n")
    print("| size | points | forward | backward | grid_sample forward | backward | forward x | backward x |")
    print("|---|---|---|---|---|---|---|---|")
    for case in (*CASES, *([LARGE] if args.large else [])):
        for local in (True, False):
            times = measure(case, local, args.device, getattr(torch, args.dtype), args.repeats)
            cells = [f"{1000 * seconds:.2f}" for seconds in times]
            ratios = [f"{times[2] / times[0]:.1f}", f"{times[3] / times[1]:.1f}"]
            size = f"{case.name}, N={case.batch}, D={case.channels}"
            print(f"| {' | '.join([size, 'local' if local else 'uniform', *cells, *ratios])} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
