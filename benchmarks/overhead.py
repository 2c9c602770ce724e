"""`python -m benchmarks.overhead`: the cost per step of Ray Train, DeepSpeed and MLflow over plain torch.

Plain torch is DistributedDataParallel. Both loops train r50_deformable on the same image of 480x640, with the same
loader, dropout, number of ranks and threads per rank. Both exist during the whole run and take turns of some seconds.
There are three kinds of turns: the plain loop with Ray stopped, the plain loop beside an idle Ray, and this project.
The first steps, and steps during which the turn changed, are not counted.

By default ranks and Ray compete for all cores. With `--rank-cores 1` the ranks share the first core, and all other
processes use the others. That is the cost of a step where Ray's processes find a free core, as on a node with GPUs. It
prints the median seconds, the added shares, the peak memory of a rank, and the time of a checkpoint.
"""

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.overhead_plain import plain_loop
from benchmarks.overhead_turns import RUNNING, Turn, turns
from jobs.cli import CommandParser, Parser, main
from pipeline import checkpoint
from pipeline.config import Config, load_config
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import CATEGORIES, write_synthetic
from pipeline.errors import ConfigError
from pipeline.launch.driver import train
from pipeline.runs.record import RunRecord
from pipeline.tracking.client import connect

PRESET = Path(__file__).parents[1] / "jobs" / "configs" / "r50_deformable.yaml"
WARM_UP = 3  # steps at the start that are left out
SEED, SIZE = 53, 560  # the first image that is drawn of these has 450x600 pixels, which the view makes 480x640


def settings(folder: Path, args: argparse.Namespace) -> Config:
    """One group of one image per rank and step."""
    values = {
        "name": "ours",
        "storage": folder / "runs",
        "data.train": folder / "shards",
        "data.val": folder / "few",
        "data.workers": 0,
        "data.augment.scales": [480],
        "data.augment.max_size": 640,
        "data.augment.crop": 0,
        "data.augment.eval_size": 480,
        "model.num_classes": len(CATEGORIES),
        "model.backbone.weights": "none",
        "train.global_batch": args.world,
        "train.micro_batch": 1,
        "train.max_steps": args.steps,
        "train.zero_stage": args.zero_stage,
        "scaling.num_workers": args.world,
        "scaling.use_gpu": "false",
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
    }
    return load_config(PRESET, [f"{key}={value}" for key, value in values.items()])


def write_data(folder: Path, images: int, evaluated: int) -> None:
    """Shards with one image again and again, so that every step takes the same, and a few to evaluate."""
    annotations, drawn = write_synthetic(folder / "drawn", images=1, seed=SEED, size=SIZE)
    tree = json.loads(annotations.read_text(encoding="utf-8"))
    (image,), boxes = tree["images"], tree["annotations"]
    tree |= {"images": [], "annotations": []}
    for number in range(1, images + 1):
        name = f"{number:012d}.jpg"
        shutil.copy(drawn / image["file_name"], folder / name)
        tree["images"].append({**image, "id": number, "file_name": name})
        tree["annotations"] += [
            {**box, "id": number * len(boxes) + at, "image_id": number} for at, box in enumerate(boxes)
        ]
    annotations.write_text(json.dumps(tree), encoding="utf-8")
    build_shards(annotations, folder, folder / "shards")
    build_shards(annotations, folder, folder / "few", limit=evaluated)


def seconds_of_ours(record: RunRecord, turn_seconds: float) -> list[float]:
    """Of the steps within a turn; where turns change a step takes longer than the two turns of others."""
    files = sorted((Path(record.folder) / "steps").glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line["seconds"] for line in lines[WARM_UP:] if line["seconds"] < turn_seconds]


def seconds_of_plain(lines: list[dict[str, float]], kind: str, over: list[Turn]) -> list[float]:
    """Of the steps within a turn of `kind`."""
    own = [turn for turn in over if turn.kind == kind]
    return [
        line["seconds"]
        for line in lines[WARM_UP:]
        if any(turn.start <= line["end"] - line["seconds"] and line["end"] <= turn.end for turn in own)
    ]


def checkpoint_cost(folder: Path, scratch: Path) -> dict[str, float]:
    """Seconds to read and to write a checkpoint folder, and its MB."""
    start = time.perf_counter()
    loaded = checkpoint.load(folder)
    read = time.perf_counter() - start
    start = time.perf_counter()
    checkpoint.save(scratch, loaded.state, loaded.weights, loaded.moments, loaded.average)
    size = sum(file.stat().st_size for file in scratch.iterdir()) / 1e6
    return {"read_s": read, "write_s": time.perf_counter() - start, "mb": size}


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Both loops in turns."""
    write_data(folder, images=args.world * args.steps, evaluated=args.world)
    config = settings(folder, args)
    with plain_loop(config, folder) as steps, turns(args.turn_seconds, args.rank_cores) as over:
        record = train(config)
    lines = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()]
    ours = connect(config.tracking.uri).get_run(record.run_id or "").data.metrics["perf/memory_mib"]
    plain = {kind: seconds_of_plain(lines, kind, over) for kind, who in RUNNING.items() if "plain" in who}
    return {
        "seconds": {**plain, "ours": seconds_of_ours(record, args.turn_seconds)},
        "mib": {**dict.fromkeys(plain, lines[-1]["mib"]), "ours": ours},
        "checkpoint": checkpoint_cost(Path(str(record.checkpoint)), folder / "again"),
    }


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.overhead", __doc__.splitlines()[0], "python -m benchmarks.overhead --steps 25")
    parser.add_argument("--world", type=int, default=2, help="ranks of one thread; default %(default)s")
    cores = "how many cores all ranks share, with all else kept off them; default 0: no such limits"
    parser.add_argument("--rank-cores", type=int, default=0, help=cores)
    parser.add_argument("--steps", type=int, default=25, help="of our loop; default %(default)s")
    parser.add_argument("--turn-seconds", type=float, default=40, help="a few steps; default %(default)s")
    parser.add_argument("--zero-stage", type=int, default=1, help="of DeepSpeed; default %(default)s")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), args)
    if min(map(len, found["seconds"].values())) < 2:
        raise ConfigError("hardly a step lies within a turn; raise --steps or --turn-seconds")
    place = f", {args.rank_cores} of the cores theirs alone" if args.rank_cores else ""
    print(f"r50_deformable, 480x640, {args.world} ranks of one thread{place}, ZeRO {args.zero_stage}\n")
    print("| loop | steps | seconds per step: median (quartiles) | peak MiB of a rank |")
    print("|---|---|---|---|")
    middle = {}
    for kind, times in found["seconds"].items():
        low, middle[kind], high = statistics.quantiles(times, n=4)
        print(f"| {kind} | {len(times)} | {middle[kind]:.3f} ({low:.3f} to {high:.3f}) | {found['mib'][kind]:.0f} |")
    pairs = itertools.combinations(middle, 2)
    found["added"] = {f"{after}, over {before}": middle[after] / middle[before] - 1 for before, after in pairs}
    print("\nadded to a step:")
    for title, share in found["added"].items():
        print(f"  {title}: {share:+.1%}")
    cost = found["checkpoint"]
    print(f"checkpoint: {cost['mb']:.0f} MB, written in {cost['write_s']:.2f} s, read in {cost['read_s']:.2f} s")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, **found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
