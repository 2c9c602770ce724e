"""`python -m benchmarks.op`: the operator's kernels against the grid_sample reference, same tensors, threads and run.

There are two forms: plain (locations and weights given) and fused (softmax and locations inside). Points are near their
own query ("local", as a trained encoder samples) or anywhere ("uniform"). For each size, form and kind of points it
prints the best time of forward and backward, and the GB/s of the bytes that must be read and written. It also
prints the share of the time that the floor takes, and the ratio of grid_sample's time. The floor is the time for those
bytes at the speed of a large copy, measured in the same run.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jobs.cli import CommandParser, Parser, main
from pipeline.csrc import build
from pipeline.model.ops import sampling

HEADS, POINTS = 8, 4
FORMS = ("plain", "fused")


@dataclass(frozen=True)
class Case:
    """One size: levels, channels per head, images; `queries` None = one per pixel, as in the encoder."""

    name: str
    shapes: Sequence[tuple[int, int]]
    channels: int
    batch: int = 1
    queries: int | None = None


CASES = (
    Case("demo encoder", [(20, 20), (10, 10), (5, 5)], 16),
    Case("encoder 320x320", [(40, 40), (20, 20), (10, 10), (5, 5)], 32),
    Case("decoder 640x640", [(80, 80), (40, 40), (20, 20), (10, 10)], 32, queries=300),
    Case("encoder 640x640", [(80, 80), (40, 40), (20, 20), (10, 10)], 32),
)
LARGE = Case("encoder 800x1333", [(100, 167), (50, 84), (25, 42), (13, 21)], 32)
LARGE_CASES = (replace(LARGE, name="decoder 800x1333", queries=300), LARGE)


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


@dataclass(frozen=True)
class Problem:
    """A form of the operator on given tensors."""

    call: Callable[[str], Tensor]  # of the implementation's name
    leaves: tuple[Tensor, ...]  # tensors that get a gradient
    constants: tuple[Tensor, ...]  # tensors without a gradient

    def least_bytes(self, output: Tensor) -> tuple[int, int]:
        """What forward, and backward, must read and write at least."""

        def size(*tensors: Tensor) -> int:
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

        once = size(*self.leaves, *self.constants, output)
        return once, once + size(*self.leaves)


def problem(case: Case, form: str, local: bool, device: str, dtype: torch.dtype) -> Problem:
    """The plain form on `inputs`, or the fused one whose points are the same, up to rounding."""
    value, locations, weights = inputs(case, local, device, dtype)
    if form == "plain":

        def plain(impl: str) -> Tensor:
            return sampling.ms_deform_attn(value, case.shapes, locations, weights, impl)

        return Problem(plain, (value, locations, weights), ())
    references = locations.detach().mean(dim=(2, 4))
    sizes = torch.tensor([[w, h] for h, w in case.shapes], device=device)[:, None]
    offsets = ((locations.detach() - references[:, :, None, :, None]) * sizes).to(dtype).requires_grad_()
    logits = weights.detach().log().to(dtype).requires_grad_()

    def fused(impl: str) -> Tensor:
        return sampling.ms_deform_attn_fused(value, case.shapes, references, offsets, logits, impl)

    return Problem(fused, (value, offsets, logits), (references,))


def now(device: str) -> float:
    """Seconds, after all work on `device` is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def copy_speed(device: str) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.ones(2**26, device=device)  # 256 MiB
    target, seconds = torch.empty_like(source), []
    for _ in range(5):
        start = now(device)
        target.copy_(source)
        seconds.append(now(device) - start)
    return 2 * source.numel() * source.element_size() / min(seconds)


def best_times(given: Problem, impl: str, device: str, times: int) -> tuple[float, float, Tensor]:
    """Best seconds of forward and backward, after one round that warms up; and the output."""
    forward, backward = [], []
    for _ in range(times + 1):
        start = now(device)
        output = given.call(impl)
        forward.append(now(device) - start)
        grad = torch.ones_like(output)
        start = now(device)
        torch.autograd.grad(output, given.leaves, grad)
        backward.append(now(device) - start)
    return min(forward[1:]), min(backward[1:]), output


def measure(given: Problem, device: str, repeats: int, reference: bool, speed: float) -> list[str]:
    """The cells of one row: milliseconds, GB/s, the floor's share and the ratio, each for forward and backward."""
    *seconds, output = best_times(given, device, device, 5 * repeats)
    counts = given.least_bytes(output)
    cells = [f"{1000 * s:.2f}" for s in seconds]
    cells += [f"{count / s / 1e9:.1f}" for count, s in zip(counts, seconds, strict=True)]
    cells += [f"{100 * count / speed / s:.0f}%" for count, s in zip(counts, seconds, strict=True)]
    if not reference:
        return [*cells, "", ""]
    *slow, _ = best_times(given, "torch", device, repeats)
    return [*cells, *(f"{base / s:.1f}" for base, s in zip(slow, seconds, strict=True))]


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.op", __doc__.splitlines()[0], "python -m benchmarks.op --threads 2 --large")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of value, offsets, logits")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="images; default %(default)s")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="default: both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=2, help="of the reference; the kernels get five times as many")
    parser.add_argument("--no-reference", action="store_true", help="do not run grid_sample")
    parser.add_argument("--large", action="store_true", help="only 800x1333 (2 GB and half a minute for grid_sample)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(args.threads)
    speed = copy_speed(args.device)
    what = f"{args.device}, {args.dtype}, torch {torch.__version__}"
    if args.device == "cpu":
        what += f", {build.instruction_set()}, {args.threads} threads"
    print(f"{what}; a large copy moves {speed / 1e9:.1f} GB/s\n")
    print("| size | form | points | ms forward | backward | GB/s | GB/s | of floor | of floor | x | x |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    dtype = getattr(torch, args.dtype)
    cases = LARGE_CASES if args.large else CASES
    for case, batch, form, local in itertools.product(cases, args.batch, args.forms, (True, False)):
        given = problem(replace(case, batch=batch), form, local, args.device, dtype)
        cells = measure(given, args.device, args.repeats, not args.no_reference, speed)
        size = f"{case.name}, N={batch}, D={case.channels}"
        print(f"| {' | '.join([size, form, 'local' if local else 'uniform', *cells])} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
