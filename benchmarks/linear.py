"""`python -m benchmarks.linear`: the model's linear layers in torch and in this project, on the CPU."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from jobs.cli import CommandParser, Parser, main
from pipeline.engine.cpu_tuning import ConvolutionLinear

# Rows, inputs and outputs of one layer at 800x1333: the encoder's tokens and the decoder's queries.
LAYERS = {
    "encoder, value and output": (22223, 256, 256),
    "encoder, offsets": (22223, 256, 256),
    "encoder, attention weights": (22223, 256, 128),
    "encoder, FFN in": (22223, 256, 1024),
    "encoder, FFN out": (22223, 1024, 256),
    "decoder, FFN in": (300, 256, 1024),
    "decoder, FFN out": (300, 1024, 256),
}


def seconds(module: nn.Linear, x: torch.Tensor) -> tuple[float, float]:
    """One forward and one backward."""
    start = time.perf_counter()
    y = module(x)
    forward = time.perf_counter() - start
    gradient = torch.ones_like(y)
    start = time.perf_counter()
    y.backward(gradient)
    return forward, time.perf_counter() - start


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.linear", __doc__.splitlines()[0], "python -m benchmarks.linear --threads 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="the best one counts; default %(default)s")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure both in turn, print, save."""
    torch.set_num_threads(args.threads)
    print(f"float32, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads\n")
    print("| layer | rows x in x out | torch ms, forward + backward | GFLOP/s | ours | GFLOP/s | x |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for layer, (count, inputs, outputs) in LAYERS.items():
        x = torch.randn(1, count, inputs, requires_grad=True)
        modules = {"torch": nn.Linear(inputs, outputs), "ours": ConvolutionLinear(inputs, outputs)}
        best = {name: [float("inf")] * 2 for name in modules}
        for _ in range(args.rounds):
            for name, module in modules.items():
                best[name] = [min(pair) for pair in zip(best[name], seconds(module, x), strict=True)]
        work = 2e-9 * count * inputs * outputs  # GFLOP of a forward; the backward does twice that
        cells = [
            f"{1e3 * forward:.2f} + {1e3 * backward:.2f} | {3 * work / (forward + backward):.0f}"
            for forward, backward in best.values()
        ]
        ratio = sum(best["torch"]) / sum(best["ours"])
        print(f"| {layer} | {count} x {inputs} x {outputs} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)
        rows.append({"layer": layer, "shape": [count, inputs, outputs], **best, "ratio": ratio})
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
