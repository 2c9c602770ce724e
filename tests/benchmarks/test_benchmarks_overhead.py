"""benchmarks.overhead: both loops train the same, only steps within a turn count, a checkpoint is measured whole."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.helpers import tiny_checkpoint
from support.waiting import wait_until

from benchmarks.overhead import checkpoint_cost, seconds_of_ours, seconds_of_plain, settings, write_data
from benchmarks.overhead_turns import RUNNING, Turn, by_role, turns
from pipeline.config import dump
from pipeline.data.loader import TrainLoader
from pipeline.errors import ConfigError
from pipeline.launch.ray_internals import WORKER_TITLE
from pipeline.runs.record import RunRecord


def test_every_step_has_the_same_image_of_480x640_on_each_rank(tmp_path: Path) -> None:
    config = settings(tmp_path, argparse.Namespace(world=2, steps=3, zero_stage=1))
    assert (config.train.micro_batch, config.train.max_steps, config.scaling.cpus_per_worker) == (1, 3, 1)
    assert config.model.dropout > 0
    write_data(tmp_path, images=6, evaluated=2)
    batches = [b for rank in (0, 1) for (b,) in TrainLoader(config.data, config.train, 0, rank, 2).epoch(0)]
    assert [batch.images.shape for batch in batches] == [(1, 3, 480, 640)] * 6
    assert len({int(batch.image_ids[0]) for batch in batches}) == 6
    assert len({len(batch.labels) for batch in batches}) == 1


def test_steps_in_which_the_turn_changed_do_not_count(tmp_path: Path) -> None:
    over = [Turn("plain", 0, 10), Turn("ours", 10, 20), Turn("plain", 20, 30)]
    ends = [1, 2, 3, 6, 9, 22, 25, 29, 31]
    lines = [{"end": float(end), "seconds": end - before} for before, end in zip([0, *ends], ends, strict=False)]
    assert seconds_of_plain(lines, "plain", over) == [3, 3, 3, 4]
    assert seconds_of_plain(lines, "plain beside an idle Ray", over) == []
    (tmp_path / "steps").mkdir()
    steps = [*[{"seconds": 9.0}] * 3, {"seconds": 2.0}, {"seconds": 23.0}, {"seconds": 3.0}]
    (tmp_path / "steps" / "epoch_000.jsonl").write_text("\n".join(map(json.dumps, steps)))
    config = settings(tmp_path, argparse.Namespace(world=2, steps=3, zero_stage=1))
    assert seconds_of_ours(RunRecord("ours", str(tmp_path), dump(config), None), 10) == [2, 3]


def test_who_has_no_turn_is_stopped_until_the_end_and_ranks_keep_to_their_cores() -> None:
    cores = os.sched_getaffinity(0)
    rank_cores = min(1, len(cores) - 1)  # a machine of one core has none to keep to
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    roles = {"plain": [*sleep, "benchmarks.overhead_plain"], "ray": sleep}
    started = {role: subprocess.Popen(command) for role, command in roles.items()}
    started["ours"] = subprocess.Popen([WORKER_TITLE, *sleep[1:]], executable=sys.executable)
    processes = {role: psutil.Process(process.pid) for role, process in started.items()}
    try:
        wait_until(lambda: all(processes[role] in found for role, found in by_role().items()))  # its title is new
        with turns(0.5, rank_cores) as over:
            seen: set[frozenset[str]] = set()

            def look() -> None:
                seen.add(frozenset(r for r, each in processes.items() if each.status() != psutil.STATUS_STOPPED))

            wait_until(lambda: len(over) >= 3 and seen >= {frozenset(running) for running in RUNNING.values()}, look)
        assert [turn.kind for turn in over][:3] == [*RUNNING]
        if rank_cores:
            assert {role: os.sched_getaffinity(each.pid) for role, each in processes.items()} == {
                "plain": {min(cores)},
                "ours": {min(cores)},
                "ray": cores,  # it was there before
            }
        assert os.sched_getaffinity(0) == cores
        assert psutil.STATUS_STOPPED not in {each.status() for each in processes.values()}
    finally:
        for process in started.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("rank_cores", [-1, 1000])
def test_ranks_may_not_take_the_cores_of_ray(rank_cores: int) -> None:
    with pytest.raises(ConfigError, match=f"--rank-cores {rank_cores}"), turns(1, rank_cores):
        pass


def test_the_checkpoint_that_is_written_is_the_one_that_was_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    cost = checkpoint_cost(folder, tmp_path / "again")
    assert {file.name for file in folder.iterdir()} == {file.name for file in (tmp_path / "again").iterdir()}
    assert cost["mb"] * 1e6 == sum(file.stat().st_size for file in (tmp_path / "again").iterdir())
