"""`python -m benchmarks.overhead`: what Ray Train, DeepSpeed and MLflow add to a step of plain DistributedDataParallel.

Both train r50_deformable on the same drawn pictures of about 480x640 with the same loader, order, dropout, number of
ranks and threads per rank; the plain loop is written out below. It also runs beside a Ray that has nothing to do: what
Ray's processes take from the cores by being there is no cost of a step, and vanishes where they have a core to
themselves. Runs take turns, and times are compared step by step, so that what differs between steps (sizes, boxes)
cancels. Prints the seconds, the shares that are added, the peak memory of a rank, and what a checkpoint takes. The
first steps of each are left out.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from jobs.cli import CommandParser, Parser, main
from pipeline import checkpoint
from pipeline.config import Config, dump_yaml, load_config
from pipeline.data.loader import TrainLoader
from pipeline.data.shards import build_shards
from pipeline.data.synthetic import CATEGORIES, write_synthetic
from pipeline.engine import dropout_seed
from pipeline.loss_module import LossModule, StepNorm
from pipeline.model import build_criterion, build_model
from pipeline.optim import build_optimizer
from pipeline.runtime import KEEP_FREED_MEMORY

PRESET = Path(__file__).parents[1] / "jobs" / "configs" / "r50_deformable.yaml"
WARM_UP = 3  # steps at the start that are left out
KINDS = ("plain", "plain beside an idle Ray", "ours")
SIZE = 560  # mean side of the drawn pictures; the view makes them 480 at the shorter side, 640 at most


def settings(folder: Path, name: str, args: argparse.Namespace) -> Config:
    """One group of one image per rank and step."""
    values = {
        "name": name,
        "storage": folder / "runs",
        "data.train": folder / "shards",
        "data.val": folder / "shards",
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


def plain_rank(config: Config) -> None:
    """One rank of the plain loop; prints its seconds per step and its peak memory."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(config.seed)
    module = LossModule(build_model(config.model), build_criterion(config.loss))
    parallel = DistributedDataParallel(module)
    optimizer = build_optimizer(module.model, config.optim, torch.device("cpu"))
    loader = TrainLoader(config.data, config.train, config.seed, rank, world)
    seconds: list[float] = []
    mark = time.perf_counter()
    module.train()
    for step, (batch,) in enumerate(loader.epoch(0)):
        if step == config.train.max_steps:
            break
        boxes = torch.tensor(float(len(batch.labels)))
        dist.all_reduce(boxes)
        torch.manual_seed(dropout_seed(config.seed, step, batch.group))
        losses = parallel(batch.to(torch.device("cpu")), StepNorm(boxes.clamp(min=1), torch.tensor(float(world))))
        (module.criterion.total(losses) * world).backward()  # DistributedDataParallel divides by it
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - mark)
        mark = time.perf_counter()
    if rank == 0:
        print(json.dumps({"seconds": seconds, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}))
    dist.destroy_process_group()


def plain(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The plain loop by torchrun, with the allocator that our workers get."""
    (folder / "plain.yaml").write_text(dump_yaml(settings(folder, "plain", args)))
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.world}", "-m", "benchmarks.overhead"]
    command = [sys.executable, "-m", *launch, "--rank-of", str(folder / "plain.yaml")]
    environment = {**os.environ, **KEEP_FREED_MEMORY, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ours(folder: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same by `driver.train`: seconds per step as its step log has them, memory as MLflow has it."""
    from pipeline.driver import train  # a rank of the plain loop shall not load Ray
    from pipeline.mlflow_client import connect

    record = train(settings(folder, name, args))
    files = sorted((Path(record.folder) / "steps").glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    metrics = connect(record.config["tracking"]["uri"]).get_run(record.run_id).data.metrics
    return {
        "seconds": [line["seconds"] for line in lines],
        "mib": metrics["perf/memory_mib"],
        "checkpoint": record.checkpoint,
    }


@contextmanager
def idle_ray() -> Iterator[None]:
    """A Ray as `driver.train` starts it."""
    import ray  # a rank of the plain loop shall not load Ray

    from pipeline.cluster import start_ray

    start_ray()
    try:
        yield
    finally:
        ray.shutdown()


def checkpoint_cost(folder: Path, scratch: Path) -> dict[str, float]:
    """Seconds to read and to write a checkpoint folder, and its MB."""
    start = time.perf_counter()
    loaded = checkpoint.load(folder)
    read = time.perf_counter() - start
    start = time.perf_counter()
    checkpoint.save(scratch, loaded.state, loaded.weights, loaded.moments, loaded.average)
    size = sum(file.stat().st_size for file in scratch.iterdir()) / 1e6
    return {"read_s": read, "write_s": time.perf_counter() - start, "mb": size}


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.overhead", __doc__.splitlines()[0], "python -m benchmarks.overhead --steps 15")
    parser.add_argument("--world", type=int, default=2, help="ranks of one thread; default %(default)s")
    parser.add_argument("--steps", type=int, default=15, help="of each run; default %(default)s")
    parser.add_argument("--zero-stage", type=int, default=1, help="of DeepSpeed; default %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind, in turn; default %(default)s")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure in turn, print, save."""
    if args.rank_of:
        plain_rank(load_config(args.rank_of, []))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        annotations, images = write_synthetic(folder / "drawn", images=args.world * args.steps, seed=1, size=SIZE)
        build_shards(annotations, images, folder / "shards")
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for turn in range(args.rounds):
            runs["plain"].append(plain(folder, args))
            with idle_ray():
                runs["plain beside an idle Ray"].append(plain(folder, args))
                runs["ours"].append(ours(folder, f"ours-{turn}", args))
        cost = checkpoint_cost(Path(runs["ours"][-1]["checkpoint"]), folder / "again")
    best = {
        kind: [min(times) for times in zip(*(found["seconds"] for found in all_), strict=True)][WARM_UP:]
        for kind, all_ in runs.items()
    }
    added = {
        f"{after}, over {before}": statistics.median(b / a for a, b in zip(best[before], best[after], strict=True)) - 1
        for before, after in (KINDS[:2], KINDS[1:], KINDS[::2])
    }
    memory = {kind: max(found["mib"] for found in all_) for kind, all_ in runs.items()}
    ranks = f"{args.world} ranks of one thread, ZeRO {args.zero_stage}"
    print(f"r50_deformable, about 480x640, {ranks}, {len(best['plain'])} steps\n")
    print("| loop | seconds per step | peak MiB of a rank |")
    print("|---|---|---|")
    for kind, times in best.items():
        print(f"| {kind} | {statistics.mean(times):.3f} | {memory[kind]:.0f} |")
    print("\nadded to a step, median over the steps:")
    for name, share in added.items():
        print(f"  {name}: {share:+.1%}")
    print(f"checkpoint: {cost['mb']:.0f} MB, written in {cost['write_s']:.2f} s, read in {cost['read_s']:.2f} s")
    if args.json:
        found = {"torch": torch.__version__, "added": added, "seconds": best, "mib": memory, "checkpoint": cost}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
