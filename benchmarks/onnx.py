"""`python -m benchmarks.onnx`: a preset in onnxruntime against the model itself, on the CPU.

Both run the same graph, from uint8 images to the 100 best detections. The model uses the operator's kernels, the
exported one its decomposition (`pipeline.model.ops.gather`). They run in turns, and the best time of each counts.
Weights are random. It prints seconds, the ratio, and how well the detections agree.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.cli import CommandParser, Parser, main
from jobs.export import parse_size
from pipeline.checkpoint import Inference, TrainState
from pipeline.config import dump, load_config
from pipeline.data.index import Category
from pipeline.engine.cpu_tuning import tune_model
from pipeline.errors import ConfigError, ExportError
from pipeline.inference.export import trace, write_onnx
from pipeline.model import build_model

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"


def build_untrained(preset: str, overrides: Sequence[str]) -> Inference:
    """A preset's model with random weights."""
    config = load_config(CONFIGS / f"{preset}.yaml", ["model.backbone.weights=none", *overrides])
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    tune_model(model, config.train, torch.device("cpu"))
    categories = tuple(Category(k, f"class {k}") for k in range(config.model.classes))
    return Inference(config, categories, model, TrainState(dump(config), categories, "", 0, 0, 0, 0))


def best_times(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of `rounds` turns of each, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(values[1:]) for name, values in seconds.items()}


def measure(preset: str, size: tuple[int, int], args: argparse.Namespace) -> dict[str, Any]:
    """Export at one size, then time both."""
    try:
        import onnxruntime
    except ImportError:
        raise ExportError("onnxruntime is missing: python -m pip install -c constraints.txt -e '.[export]'") from None
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    exported = trace(build_untrained(preset, args.set), 100, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        agreement = write_onnx(exported, path)
        exporting, megabytes = time.perf_counter() - start, path.stat().st_size / 1e6
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = torch.randint(0, 256, (args.images, 3, *size), dtype=torch.uint8)
    sizes = torch.tensor([size] * args.images)
    given = {"images": images.numpy(), "sizes": sizes.numpy()}
    with torch.no_grad():
        seconds = best_times(
            {"model": lambda: exported.eager(images, sizes), "onnxruntime": lambda: session.run(None, given)},
            args.rounds,
        )
    return {**seconds, "ratio": seconds["onnxruntime"] / seconds["model"], "agreement": agreement,
            "export_seconds": exporting, "megabytes": megabytes}  # fmt: skip


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.onnx", __doc__.splitlines()[0], "python -m benchmarks.onnx --size 640x640")
    parser.add_argument("--presets", nargs="+", default=["r50_deformable"], help="default %(default)s")
    parser.add_argument("--size", default="640x640", metavar="HxW", help="default %(default)s")
    parser.add_argument("--images", type=int, default=1, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    size = parse_size(args.size)
    unknown = [preset for preset in args.presets if not (CONFIGS / f"{preset}.yaml").is_file()]
    if size is None or unknown or min(args.rounds, args.images) < 1:
        raise ConfigError(f"--presets takes names of files in {CONFIGS}, --rounds and --images at least 1: {unknown}")
    setup = {"torch": torch.__version__, "size": args.size, "images": args.images, "threads": args.threads}
    print(f"{setup}\n\n| preset | model s | onnxruntime s | onnxruntime over model | agreement | export s | MB |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for preset in args.presets:
        found = results[preset] = measure(preset, size, args)
        print(
            f"| {preset} | {found['model']:.3f} | {found['onnxruntime']:.3f} | {found['ratio']:.2f} "
            f"| {found['agreement']:.1%} | {found['export_seconds']:.0f} | {found['megabytes']:.0f} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"setup": setup, "results": results}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
