"""Estimated and measured time and memory of a small run, and the advice where it does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.data import write_shards

from pipeline.config import Config, from_dict, override
from pipeline.errors import MemoryFullError
from pipeline.launch.preflight import GIB, CheckedRun, check_run
from pipeline.launch.sizing import estimate as module
from pipeline.launch.sizing import probe
from pipeline.launch.sizing.estimate import Estimate, describe, describe_run, duration, estimate_run, work_of


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> CheckedRun:
    folder = tmp_path_factory.mktemp("sizing")
    index = write_shards(folder)
    tree = {
        "storage": str(folder / "runs"),
        "data": {"train": index.folder, "val": index.folder,
                 "augment": {"scales": [64, 96], "max_size": 160, "crop": 0.0, "eval_size": 64}},
        "model": {"num_classes": 3, "hidden_dim": 32, "heads": 4, "enc_layers": 1, "dec_layers": 1, "queries": 10,
                  "backbone": {"name": "conv5", "weights": "none", "norm": "group", "width": 8}},
        "train": {"global_batch": 4, "micro_batch": 2, "epochs": 10, "eval_epochs": 4},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }  # fmt: skip
    return check_run(from_dict(tree))


def estimate_of(checked: CheckedRun, *settings: str) -> Estimate:
    config = override(checked.config, list(settings))
    found = estimate_run(config, checked.val, checked.size, speed=1e9)
    assert found is not None
    return found


def test_work_of_counts_steps_evaluations_and_images(checked: CheckedRun) -> None:
    work = work_of(checked.config, checked.val)
    assert (work.steps, work.evaluations, work.eval_images) == (30, 3, 12)
    assert work.mean_area <= work.largest[0] * work.largest[1]
    short = work_of(override(checked.config, ["train.max_steps=5"]), checked.val)
    assert (short.steps, short.evaluations) == (5, 1)


def test_estimate_follows_what_costs_time_and_memory(checked: CheckedRun) -> None:
    base = estimate_of(checked)
    assert estimate_of(checked, "train.epochs=20").train_seconds == pytest.approx(2 * base.train_seconds)
    assert estimate_of(checked, "scaling.num_workers=2").train_seconds == pytest.approx(base.train_seconds / 2)
    assert estimate_of(checked, "train.micro_batch=4").memory_bytes > base.memory_bytes
    assert estimate_of(checked, "data.augment.scales=[160]").memory_bytes > base.memory_bytes


def test_describe_of_a_run_that_does_not_fit_names_the_setting(checked: CheckedRun) -> None:
    fits = Estimate(60, 1, 0.1, GIB, 2 * GIB, on_gpu=False)
    assert "train.micro_batch" not in describe(checked.config, fits)
    assert "train.micro_batch=1" in describe(checked.config, replace(fits, available_bytes=GIB / 2))


def test_describe_run_of_a_detector_that_cannot_be_counted_says_so(checked: CheckedRun) -> None:
    model = checked.config.model.model_copy(update={"name": "faster_rcnn"})
    config = checked.config.model_copy(update={"model": model})
    assert "--probe" in describe_run(replace(checked, config=config))


def test_describe_run_on_a_gpu_that_is_full_does_not_end_the_run(
    checked: CheckedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(module, "measure_speed", fail)
    assert describe_run(checked) == "no estimate: CUDA out of memory."


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (600, "10 min"), (3 * 3600, "3.0 h")])
def test_duration_has_a_unit_that_can_be_read(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_probe_measures_the_whole_run_from_two_steps(checked: CheckedRun) -> None:
    found = probe.measure_run(checked)
    assert found.measured
    assert found.train_seconds == pytest.approx(found.step_seconds * 30)
    assert found.eval_seconds > 0
    assert found.memory_bytes > 50e6
    assert found.fits


def test_probe_that_runs_out_of_memory_names_the_setting(checked: CheckedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(probe.Engine, "train_step", fail)
    with pytest.raises(MemoryFullError, match=r"train\.micro_batch=1"):
        probe.measure_run(checked)


def test_measure_speed_is_that_of_a_real_product(checked: CheckedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PRODUCT_SIDE, "cpu", 256)
    config: Config = checked.config
    threads = torch.get_num_threads()
    assert 1e8 < module.measure_speed(config, on_gpu=False) < 1e14
    assert torch.get_num_threads() == threads


def test_estimate_writes_nothing(checked: CheckedRun) -> None:
    assert not Path(checked.config.storage).exists()
