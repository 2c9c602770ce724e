"""Launches and waits of a training step stay below what was reached; the counters count what they promise."""

import json
import subprocess
import sys

import pytest
import torch
from support.paths import ROOT

from benchmarks.launches import Launches, Waits, build_engine, count
from benchmarks.model import random_batch
from pipeline.config import load_config

OVERRIDES = ["model.backbone.weights=none", "train.compile=false"]


def count_preset(name: str, *overrides: str, groups: int = 1) -> tuple[int, int]:
    config = load_config(ROOT / "jobs" / "configs" / f"{name}.yaml", [*OVERRIDES, *overrides])
    launches, waits = count(build_engine(config), [random_batch(2, 64, 64)] * groups)
    return launches.counts.total(), waits.counts.total()


def test_step_of_the_gpu_preset_stays_within_its_launches_and_waits() -> None:
    launches, waits = count_preset("r50_deformable_gpu")
    assert launches <= 1486
    assert waits <= 2


@pytest.mark.slow  # the same on the preset that the other is compared with
def test_step_of_the_published_preset_stays_within_its_launches_and_waits() -> None:
    launches, waits = count_preset("r50_deformable", "train.precision=bf16")
    assert launches <= 2560
    assert waits <= 3


@pytest.mark.slow  # a process of its own, because DeepSpeed needs a process group
@pytest.mark.parametrize(("stage", "launches", "waits"), [(0, 2560, 3), (1, 3855, 10)])
def test_step_through_deepspeed_stays_within_its_launches_and_waits(stage: int, launches: int, waits: int) -> None:
    command = [sys.executable, "-m", "benchmarks.launches", "--deepspeed", "--set"]
    command += ["train.precision=bf16", f"train.zero_stage={stage}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert 2000 < row["launches"] <= launches
    assert sum(row["waits"].values()) <= waits


def test_launches_leave_out_views_and_count_lists_once() -> None:
    x = [torch.ones(2, 3), torch.ones(4)]
    factors = [torch.ones(3), torch.ones(1)]
    with Launches() as launches:
        x[0].t().reshape(-1)[:2].add(1)  # a copy and a sum
        torch._foreach_mul_(x, 2.0)
        torch._foreach_mul_(x, factors)  # shapes differ: one launch per tensor
    assert launches.counts == {"clone": 1, "add": 1, "_foreach_mul_": 3}


def test_waits_count_reads_of_the_device_and_blocking_uploads() -> None:
    host, device = torch.ones(2), torch.ones(2)
    with Waits([host]) as waits:
        host.tolist()
        read = device.cpu()
        read.tolist()
        float(device.sum())
        torch.tensor([1.0])
        torch.tensor([1.0], device="cpu")
    assert waits.counts == {"cpu": 1, "__float__": 1, "tensor": 1}
