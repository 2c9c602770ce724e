"""`python -m benchmarks.complexity`: dense against deformable attention between a map's pixels, as the map grows.

The claim of arXiv 2010.04159, section 4.1, is quadratic against linear. The benchmark times forward and backward of one
layer (8 heads, 4 points) and measures the peak memory above the start. Each size runs in its own process. Dense
attention is measured with its matrix, as in DETR's published code, and with torch's fused kernel. The fused kernel's
memory is linear, but its time is not. It prints a table, and draws with `--plot`. Sizes that exceed memory or time are
left out and named.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from jobs.cli import CommandParser, Parser, main
from pipeline.model.attention import MSDeformAttn
from pipeline.model.position import Pyramid

DIM, HEADS, POINTS = 256, 8, 4
SIDES = (32, 48, 64, 90, 128, 173)  # of square maps: 1k to 30k pixels
KINDS = ("deformable", "dense", "dense fused")


class DenseAttention(nn.Module):
    """Multi-head softmax attention of every pixel to every pixel."""

    def __init__(self, keeps_matrix: bool) -> None:
        super().__init__()
        self.keeps_matrix = keeps_matrix
        self.projections = nn.Linear(DIM, 3 * DIM)
        self.output = nn.Linear(DIM, DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        """[1, S, DIM] -> [1, S, DIM]."""
        query, key, value = self.projections(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.keeps_matrix:
            mixed = (query @ key.transpose(-1, -2) / math.sqrt(DIM // HEADS)).softmax(-1) @ value
        else:
            mixed = scaled_dot_product_attention(query, key, value)
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


def dense_bytes(pixels: int) -> int:
    """Peak of dense attention's matrices: logits, softmax and two gradients, fp32."""
    return 4 * HEADS * pixels**2 * 4


def available_bytes() -> int:
    """Memory that this machine can still give (Linux)."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def measure(kind: str, side: int, threads: int) -> dict[str, float]:
    """Seconds of the better of two forward and backward passes, and MiB above the initial resident memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    pixels = side * side
    tokens = torch.randn(1, pixels, DIM, requires_grad=True)
    pyramid = Pyramid.of([torch.zeros(1, side, side, dtype=torch.bool)])
    references = pyramid.on_levels(pyramid.centres())
    deformable, dense = MSDeformAttn(DIM, HEADS, 1, POINTS), DenseAttention(kind == "dense")
    warm = torch.randn(1, 64, DIM)  # libraries load, threads start
    dense(warm).sum().backward()
    small = Pyramid.of([torch.zeros(1, 8, 8, dtype=torch.bool)])
    deformable(warm, small.on_levels(small.centres()), warm, small).sum().backward()
    start_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        output = deformable(tokens, references, tokens, pyramid) if kind == "deformable" else dense(tokens)
        output.sum().backward()
        seconds.append(time.perf_counter() - start)
        del output
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_kib) / 1024
    return {"pixels": pixels, "seconds": min(seconds), "mib": mib}


def in_process(kind: str, side: int, threads: int, limit: float) -> dict[str, float] | None:
    """`measure` in its own process; None if it took too long or died."""
    command = [sys.executable, "-m", "benchmarks.complexity", "--threads", str(threads)]
    command += ["--sides", str(side), "--only", kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def exponent(points: list[dict[str, float]], what: str) -> float:
    """The power of the pixels with which `what` grows, between the two largest sizes."""
    (a, b) = points[-2:]
    return math.log(b[what] / a[what]) / math.log(b["pixels"] / a["pixels"])


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Time and memory over pixels, both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, what, label in zip(
        axes, ("seconds", "mib"), ("forward and backward, s", "peak memory, MiB"), strict=True
    ):
        for kind, points in results.items():
            axis.plot([p["pixels"] for p in points], [p[what] for p in points], "o-", label=kind)
        axis.set(xscale="log", yscale="log", xlabel="pixels", ylabel=label)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser(
        "benchmarks.complexity", __doc__.splitlines()[0], "python -m benchmarks.complexity --plot complexity.png"
    )
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES, help="of square maps; default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one size; default %(default)s")
    parser.add_argument("--only", choices=KINDS, help="measure this one here and print it as JSON")
    parser.add_argument("--plot", type=Path, help="write the plot to this PNG")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw."""
    if args.only:
        for side in args.sides:
            print(json.dumps(measure(args.only, side, args.threads)))
        return 0
    print(f"one attention layer over a map, d = {DIM}, {HEADS} heads, {POINTS} points, {args.threads} threads\n")
    print("| pixels | attention | seconds | MiB |\n|---|---|---|---|")
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    stopped: dict[str, str] = {}
    for side in args.sides:
        for kind in KINDS:
            if kind == "dense" and dense_bytes(side * side) > available_bytes():
                stopped.setdefault(kind, f"{dense_bytes(side * side) / 2**30:.0f} GiB do not fit")
            result = None if kind in stopped else in_process(kind, side, args.threads, args.limit)
            if result is None:
                why = stopped.setdefault(kind, f"no result within {args.limit:.0f} s")
                print(f"| {side * side} | {kind} | left out: {why} | |", flush=True)
                continue
            results[kind].append(result)
            print(f"| {side * side} | {kind} | {result['seconds']:.3f} | {result['mib']:.0f} |", flush=True)
    print()
    for kind, points in results.items():
        if len(points) > 1 and min(point["mib"] for point in points[-2:]) > 0:
            time_power, memory_power = exponent(points, "seconds"), exponent(points, "mib")
            print(f"{kind}: time grows as pixels^{time_power:.2f}, memory as pixels^{memory_power:.2f}")
    if args.json:
        args.json.write_text(
            json.dumps({"threads": args.threads, "results": results}, indent=1) + "\n", encoding="utf-8"
        )
    if args.plot:
        plot(results, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
