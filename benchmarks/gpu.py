"""`python -m benchmarks.gpu`: build the CUDA operator, check every variant, and time it and the training step.

It needs one GPU, torch, torchvision, scipy, pydantic, PyYAML and this project. `checks` compares every kernel with
double precision, `steps` times the engine's own step, `times` the operator (captured CUDA graphs: kernels only, no
Python). Each part runs in its own process, because one illegal access ends all CUDA work of a process. Every row is
written into the result file, DATE_GPU.json, as soon as it is measured. Exits 2 without a GPU, and 1 if a variant is
wrong.
"""

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_operator import (
    CANDIDATES,
    FORMS,
    SMALL,
    TOLERANCE,
    Measurement,
    check,
    describe,
    kernels_of,
    measure,
    measurements,
)
from benchmarks.gpu_step import VARIANTS, measure_step
from jobs.cli import CommandParser, Parser, main
from pipeline.csrc import build
from pipeline.csrc.kernels import choose_kernels
from pipeline.errors import OpError

RESULTS = Path(__file__).parent / "results"
BUDGET = 450.0  # seconds; parts that do not fit are skipped and named
PARTS = ("checks", "steps", "times")
SIZE = (800, 1333)
Task = tuple[str, Callable[[], dict[str, Any]]]  # the row's name, and how it is measured


def check_tasks() -> Iterator[Task]:
    """Every kernel, type and number of channels, on small maps."""
    for form in (*FORMS[:3], *CANDIDATES):
        for dtype in TOLERANCE:
            for channels in (32, 64, 128) if form in CANDIDATES else (16, 32, 64, 128, 40):
                for queries in (None, 37):
                    row = Measurement(replace(SMALL, channels=channels, queries=queries), True, dtype, form)
                    yield str(describe(row)), partial(_with_kernels, row, check, "cuda")


def time_tasks(batches: tuple[int, ...]) -> Iterator[Task]:
    """The operator at COCO's size."""
    for row in measurements(batches):
        yield str(describe(row)), partial(_with_kernels, row, measure)


def _with_kernels(row: Measurement, function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    choose_kernels(build.load("cuda"), kernels_of(row.form))
    try:
        return function(row, *args)
    finally:
        torch.use_deterministic_algorithms(False)


def tasks_of(unit: str, args: argparse.Namespace) -> Iterator[Task]:
    """What is measured in the process of a unit: `checks`, `times`, or `steps:VARIANT`."""
    part, _, name = unit.partition(":")
    if part == "checks":
        yield from check_tasks()
    elif part == "times":
        yield from time_tasks(tuple(args.batches))
    else:
        yield name, partial(measure_step, VARIANTS[name], SIZE, args.steps, new_sizes=args.new_sizes)


def work(tasks: Iterator[Task]) -> None:
    """Print a line of JSON for each task: `{"row": ...}` or `{"left_out": why}`."""
    for name, function in tasks:
        try:
            line: dict[str, Any] = {"row": function()}
        except (RuntimeError, ImportError, OpError) as error:
            line = {"left_out": f"{name}: {type(error).__name__}: {error}"}
        print(json.dumps(line), flush=True)


def run_unit(command: list[str], seconds: float, take: Callable[[dict[str, Any]], None]) -> str:
    """Run a process and `take` each line of JSON that it prints; why it came to no proper end, or an empty string."""
    late = threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    take(json.loads(line))
        except BaseException:  # Ctrl-C: the process would be waited for
            process.kill()
            raise
        finally:
            timer.cancel()
        code = process.wait()
    if late.is_set():
        return "no time left"
    return f"its process ended with code {code}" if code else ""


def versions() -> dict[str, Any]:
    """What the numbers depend on."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RESULTS).stdout.strip()
    except OSError:  # a machine that got the files without git
        commit = ""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "memory_gib": properties.total_memory / 2**30}
        facts |= {"sms": properties.multi_processor_count, "library": build.facts(build.build("cuda"))}
    return facts


def write(results: dict[str, Any], folder: Path) -> Path:
    """Keep the results as DATE_GPU.json."""
    gpu = re.sub(r"[^a-z0-9]+", "-", str(results["versions"].get("gpu", "none")).lower()).strip("-")
    path = folder / f"{results['versions']['date'][:10]}_{gpu}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.gpu", __doc__.splitlines()[0], "python -m benchmarks.gpu --budget 300")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all of them")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything; default %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default %(default)s")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:3], help="of steps; default %(default)s"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps per variant; default %(default)s")
    parser.add_argument("--new-sizes", type=int, default=0, help="image sizes to try that a step has not seen")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 1], help="images per call of the operator")
    parser.add_argument("--unit", help=argparse.SUPPRESS)  # the part that a child process runs
    return parser


def run(args: argparse.Namespace) -> int:
    """Build, check, time, write."""
    if not torch.cuda.is_available():
        raise OpError("there is no CUDA device here; run this on a machine with a GPU (benchmarks.op times the CPU)")
    if args.unit:
        work(tasks_of(args.unit, args))
        return 0
    start = time.monotonic()
    results: dict[str, Any] = {"versions": versions(), "checks": [], "steps": [], "times": [], "left_out": []}
    own = ["--steps", str(args.steps), "--new-sizes", str(args.new_sizes), "--batches", *map(str, args.batches)]
    units = [u for part in args.parts for u in ([f"steps:{v}" for v in args.variants] if part == "steps" else [part])]
    for unit in units:
        part = unit.partition(":")[0]

        def take(line: dict[str, Any], part: str = part) -> None:
            results[part].append(line["row"]) if "row" in line else results["left_out"].append(line["left_out"])
            print(next(iter(line.values())), flush=True)
            write(results, args.out)

        left = args.budget - (time.monotonic() - start)
        command = [sys.executable, "-m", "benchmarks.gpu", "--unit", unit, *own]
        fault = run_unit(command, left, take) if left > 0 else "no time left"
        if fault:
            results["left_out"].append(f"{unit}: {fault}")
            print(results["left_out"][-1], flush=True)
    results["seconds"] = time.monotonic() - start
    print(write(results, args.out))
    wrong = [row for row in results["checks"] if not row["ok"]]
    failed = [entry for entry in results["left_out"] if not entry.endswith("no time left")]
    print(f"{len(results['checks'])} checks, {len(wrong)} wrong, {len(failed)} failed, {results['seconds']:.0f} s")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
