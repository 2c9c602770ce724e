"""`python -m benchmarks.evaluation`: time and memory of COCO AP, by all evaluators that are installed.

The data are drawn as COCO's validation images: 5,000 of them, with the best 100 and 300 detections of each. Every
evaluator runs in a process of its own, in turns. Measured is the way from detections in memory to the 12 numbers. The
last column says whether precision, recall and scores have the bits of pycocotools, or how far they are off at most.
"""

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.analysis import draw_detections, draw_ground_truth
from benchmarks.evaluation_peers import OWN, evaluators, prepare
from jobs.cli import CommandParser, Parser, main
from pipeline.evaluation.backends.base import LIMITS, Arrays
from pipeline.files.scratch import scratch_folder

REFERENCE = "pycocotools"
ARRAYS = ("precision", "recall", "scores")


def measure(name: str, folder: Path, limits: list[int], keep: bool) -> dict[str, Any]:
    """One evaluation by `name` in this process; with `keep` its arrays are written into `folder`."""
    truth, found = pickle.loads((folder / "data.pickle").read_bytes())  # written by this benchmark
    work = prepare(name, truth, found, limits)
    Path("/proc/self/clear_refs").write_bytes(b"5")  # the peak starts anew
    before, wall, processor = _status_mib("VmRSS"), time.perf_counter(), time.process_time()
    arrays = work()
    row = {
        "wall_s": time.perf_counter() - wall,
        "processor_s": time.process_time() - processor,
        "peak_mib": _status_mib("VmHWM") - before,
    }
    if keep:
        np.savez(folder / f"{name}.npz", **{key: getattr(arrays, key) for key in ARRAYS})
    return row


def _status_mib(key: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(lines[key].split()[0]) / 1024


def difference(name: str, folder: Path) -> str:
    """Whether the arrays that `name` wrote are those of the reference."""
    mine, others = (Arrays(**np.load(folder / f"{each}.npz")) for each in (name, REFERENCE))
    apart = mine.differences(others)
    far = [f"{key} by {np.abs(getattr(mine, key) - getattr(others, key)).max():.1e}" for key in apart]
    return ", ".join(far) or "equal"


def compare(images: int, top_k: int, rounds: int, names: list[str]) -> list[dict[str, Any]]:
    """The medians of every evaluator; the slow reference runs once."""
    limits = [*LIMITS, top_k] if top_k > LIMITS[-1] else list(LIMITS)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with scratch_folder("evaluation") as folder:
        truth = draw_ground_truth(images, np.random.default_rng(0))
        data = truth, draw_detections(truth, top_k, shift=0.08, seed=1)
        (folder / "data.pickle").write_bytes(pickle.dumps(data))
        for turn in range(rounds):
            for name in names if turn == 0 else [name for name in names if name != REFERENCE]:
                arguments = [name, str(folder), json.dumps(limits), json.dumps(turn == 0)]
                command = [sys.executable, "-m", "benchmarks.evaluation", "--one", *arguments]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                rows[name].append(json.loads(done.stdout.splitlines()[-1]))  # some packages print lines of their own
        found = []
        for name in names:
            medians = {key: statistics.median(row[key] for row in rows[name]) for key in rows[name][0]}
            equal = difference(name, folder) if REFERENCE in names else "-"
            found.append({"evaluator": name, "top_k": top_k, **medians, "equal": equal})
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table; ratios are those of processor time to the fastest package."""
    fastest = min(row["processor_s"] for row in rows if not row["evaluator"].startswith(OWN))
    print("| evaluator | processor s | ratio | wall s | more MiB | arrays |\n|---|---|---|---|---|---|")
    for row in rows:
        times = f"{row['processor_s']:.2f} | {row['processor_s'] / fastest:.2f} | {row['wall_s']:.2f}"
        print(f"| {row['evaluator']} | {times} | {row['peak_mib']:.0f} | {row['equal']} |", flush=True)


def build_parser() -> Parser:
    """The command line."""
    example = "python -m benchmarks.evaluation --images 500 --rounds 3"
    parser = CommandParser("benchmarks.evaluation", __doc__.splitlines()[0], example)
    parser.add_argument("--images", type=int, default=5000, help="default %(default)s")
    parser.add_argument("--top-k", type=int, nargs="+", default=[100, 300], help="of an image; default 100 300")
    parser.add_argument("--rounds", type=int, default=5, help="of each evaluator but pycocotools; default %(default)s")
    parser.add_argument("--only", nargs="+", choices=evaluators(), help="some evaluators")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # of an own process
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    if args.one:
        name, folder, limits, keep = args.one
        print(json.dumps(measure(name, Path(folder), json.loads(limits), json.loads(keep))))
        return 0
    found = []
    for top_k in args.top_k:
        print(f"\n{args.images} images x {top_k} detections\n")
        rows = compare(args.images, top_k, args.rounds, args.only or evaluators())
        show(rows)
        found += rows
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
