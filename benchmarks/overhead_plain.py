"""The plain loop for `benchmarks.overhead`: PyTorch's DistributedDataParallel, written out; it runs endlessly."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import Config, dump_yaml, load_config
from pipeline.data.loader import TrainLoader
from pipeline.engine.cpu_tuning import KEEP_FREED_MEMORY, tune_model
from pipeline.engine.module import LossModule, StepNorm
from pipeline.engine.optim import build_optimizer
from pipeline.engine.step import dropout_seed
from pipeline.model import build_criterion, build_model


@contextmanager
def plain_loop(config: Config, folder: Path) -> Iterator[Path]:
    """The loop by torchrun, with the allocator that our workers get.

    Yields:
        The file that gets a line per step: its end in Unix seconds, its seconds, the peak MiB of the first rank so far.

    Raises:
        SystemExit: it ended by itself, with the end of what it said.
    """
    (folder / "plain.yaml").write_text(dump_yaml(config), encoding="utf-8")
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={config.scaling.num_workers}"]
    command = [sys.executable, "-m", *launch, "-m", "benchmarks.overhead_plain", str(folder / "plain.yaml")]
    environment = {**os.environ, **KEEP_FREED_MEMORY, "OMP_NUM_THREADS": "1"}
    steps, said = folder / "plain.jsonl", folder / "plain.txt"
    with steps.open("w", encoding="utf-8") as out, said.open("w", encoding="utf-8") as errors:
        # It has its own process group: a stopped process whose group loses its shell gets SIGHUP, which ends torchrun.
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment, start_new_session=True)
        try:
            yield steps
        finally:
            failed = process.poll() is not None
            process.terminate()
            process.wait()
    if failed:
        raise SystemExit(said.read_text(encoding="utf-8")[-2000:])


def train_plainly(config: Config) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(config.seed)
    module = LossModule(build_model(config.model), build_criterion(config.loss))
    tune_model(module.model, config.train, torch.device("cpu"))
    parallel = DistributedDataParallel(module)
    optimizer = build_optimizer(module.model, config.optim, torch.device("cpu"))
    loader = TrainLoader(config.data, config.train, config.seed, rank, world)
    module.train()
    mark = time.perf_counter()
    for step, (batch,) in enumerate(batches for epoch in count() for batches in loader.epoch(epoch)):
        boxes = torch.tensor(float(len(batch.labels)))
        dist.all_reduce(boxes)
        torch.manual_seed(dropout_seed(config.seed, step, batch.group))
        losses = parallel(batch.to(torch.device("cpu")), StepNorm(boxes.clamp(min=1), torch.tensor(float(world))))
        (module.criterion.total(losses) * world).backward()  # DistributedDataParallel divides by it
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds, mark = time.perf_counter() - mark, time.perf_counter()
        if rank == 0:
            mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            print(json.dumps({"end": time.time(), "seconds": seconds, "mib": mib}), flush=True)


if __name__ == "__main__":
    train_plainly(load_config(Path(sys.argv[1]), []))
