"""`python -m benchmarks.gpu_machine.kernels`: the fused operator at 800x1333, once for a profiler, or timed.

`--kernels` runs the shipped kernels and others in one process, on the same inputs.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_operator import fused_inputs
from benchmarks.op import HEADS, LARGE, POINTS
from jobs.cli import CommandParser, Parser, main
from pipeline.csrc import build
from pipeline.csrc.kernels import choose_kernels, parse_kernels
from pipeline.errors import OpError
from pipeline.model.attention import MSDeformAttn
from pipeline.model.ops import sampling

REPLAYS, REPEATS = 7, 10


def fresh_offsets(like: Tensor) -> Tensor:
    """What a model that was not trained yet samples, in the shape of `like`."""
    levels = len(LARGE.shapes)
    bias = MSDeformAttn(HEADS * LARGE.channels, HEADS, levels, POINTS).sampling_offsets.bias.detach()
    return bias.view(HEADS, levels, POINTS, 2).to(like).expand_as(like).contiguous()


def median_ms(function: Callable[[], Any]) -> float:
    """Milliseconds of one call, from a captured CUDA graph of REPEATS calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            function()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / REPEATS)
    return statistics.median(times[1:])


def calls(dtype: torch.dtype, args: argparse.Namespace, device: str) -> dict[str, Callable[[], Any]]:
    """Forward, backward, and backward without the gradient of value, which separates reductions from the rest."""
    case = replace(LARGE, batch=args.batch)
    value, references, offsets, logits = (t.detach() for t in fused_inputs(case, not args.uniform, device, dtype))
    if args.fresh:
        offsets, logits = fresh_offsets(offsets), torch.zeros_like(logits)
    flat = [side for shape in case.shapes for side in shape]
    sampling.choose("cuda", device)
    library = torch.ops.deformable_detr
    forward = partial(library.ms_deform_attn_fused, value, references, offsets, logits, flat)
    grad = torch.randn_like(forward())
    backward = partial(library.ms_deform_attn_fused_backward, grad, value, references, offsets, logits, flat)
    return {
        "forward_ms": forward,
        "backward_ms": partial(backward, [True, False, True, True]),
        "backward_without_value_ms": partial(backward, [False, False, True, True]),
    }


def build_parser() -> Parser:
    """The command line."""
    name = "benchmarks.gpu_machine.kernels"
    parser = CommandParser(name, __doc__.splitlines()[0], f"python -m {name} --time")
    parser.add_argument("--time", action="store_true", help="print milliseconds as JSON, else run each kernel once")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=["shipped"],
        metavar="NAMES",
        help="each a choice as in DEFORMABLE_OP_KERNELS, such as specialised,sectors; default %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=1, help="of timing all choices; default %(default)s")
    parser.add_argument("--batch", type=int, default=2, help="images; default %(default)s")
    parser.add_argument("--uniform", action="store_true", help="points anywhere, not near their query")
    parser.add_argument("--fresh", action="store_true", help="points of a model that was not trained yet")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run or time."""
    if not torch.cuda.is_available():
        raise OpError("there is no CUDA device here; run this on a machine with a GPU (benchmarks.op times the CPU)")
    points = "fresh" if args.fresh else "uniform" if args.uniform else "local"
    choices = {names: parse_kernels(names) for names in args.kernels}
    library = build.load("cuda")
    for name in args.dtypes:
        found = calls(getattr(torch, name), args, "cuda")
        for chosen in [*choices] * args.rounds:
            choose_kernels(library, choices[chosen])
            if args.time:
                row = {"dtype": name, "points": points, "kernels": chosen}
                row |= {key: round(median_ms(call), 4) for key, call in found.items()}
                print(json.dumps(row), flush=True)
                continue
            for key in ("forward_ms", "backward_ms"):
                found[key]()
            torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
