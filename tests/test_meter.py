"""Means over a window, and the line a person reads."""

import pytest

from pipeline.engine import StepResult
from pipeline.meter import Meter


def result(loss: float, applied: bool = True) -> StepResult:
    return StepResult(applied, 2.0, {"loss": loss, "loss_ce": loss / 2}, [1])


def test_flush_averages_and_starts_anew() -> None:
    meter = Meter(global_batch=4, step=10, total_steps=20)
    for item in meter.waits([result(1.0), result(3.0, applied=False)]):
        meter.add(item)
    metrics = meter.flush()
    assert metrics["train/loss"] == 2.0
    assert metrics["train/loss_ce"] == 1.0
    assert metrics["train/skipped_steps"] == 1.0
    assert 0 <= metrics["perf/data_wait_share"] <= 1
    assert metrics["perf/images_per_s"] > 0
    assert metrics["perf/memory_mib"] > 1
    meter.add(result(5.0))
    assert meter.flush()["train/loss"] == 5.0


def test_line_counts_from_the_resumed_step() -> None:
    meter = Meter(global_batch=4, step=10, total_steps=12)
    meter.add(result(1.5))
    meter.flush()
    line = meter.line(epoch=3, ap=0.25)
    assert "epoch 3  step 11/12  loss 1.5000  AP 0.2500" in line
    assert "AP -" in meter.line(epoch=0, ap=None)


def test_waits_passes_everything_through() -> None:
    assert list(Meter(1, 0, 1).waits(range(5))) == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        list(Meter(1, 0, 1).waits(1 // x for x in [1, 0]))
