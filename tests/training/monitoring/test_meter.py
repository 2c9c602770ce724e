"""Means over a log interval, and the progress line."""

from collections.abc import Iterator

import pytest

from pipeline.engine.step import StepResult
from pipeline.training.monitoring import meter as meter_module
from pipeline.training.monitoring.meter import Meter, StepTimes, format_duration


def result(loss: float, applied: bool = True) -> StepResult:
    return StepResult(applied, 2.0, {"loss": loss, "loss_ce": loss / 2}, [1], forward_seconds=0.25)


def test_flush_two_steps_gives_means_and_resets() -> None:
    meter = Meter(global_batch=4, step=10, total_steps=20)
    for item in meter.time_waits([result(1.0), result(3.0, applied=False)]):
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


def test_line_of_resumed_run_counts_from_its_step() -> None:
    meter = Meter(global_batch=4, step=10, total_steps=12)
    meter.add(result(1.5))
    meter.flush()
    line = meter.line(epoch=2, epochs=5, ap="0.2500 (epoch 2)")
    assert "epoch 3/5  step 11/12  loss 1.5000  AP 0.2500 (epoch 2)" in line


def test_format_duration_gives_minutes_or_hours() -> None:
    assert [format_duration(s) for s in (0, 59.9, 61, 3600, 360_005)] == [
        "0:00",
        "0:59",
        "1:01",
        "1:00:00",
        "100:00:05",
    ]


class Clock:
    """A clock that moves forward only when a test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(meter_module.time, "monotonic", lambda: self.now)


def test_add_separates_waiting_from_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for data and for others is counted separately; evaluations and checkpoints are in none of it."""
    clock = Clock(monkeypatch)
    meter = Meter(global_batch=4, step=0, total_steps=9)

    def slow() -> Iterator[int]:
        for number in range(4):
            clock.now += 0.5  # decoding
            yield number

    found = []
    for number in meter.time_waits(slow()):
        clock.now += 1.0 + number
        found.append(meter.add(result(1.0)))
        with meter.pause():
            clock.now += 60.0
    assert found == [StepTimes(1.5 + number, 0.5, 0.75) for number in range(4)]
    metrics = meter.flush()
    assert metrics["perf/step_p50_s"] == 3.0
    assert metrics["perf/step_p95_s"] == pytest.approx(4.35)
    assert metrics["perf/own_s"] == 0.75
    assert metrics["perf/data_wait_share"] == pytest.approx(2 / 12)
    assert metrics["perf/images_per_s"] == pytest.approx(16 / 12)


def test_time_waits_passes_items_and_errors_through() -> None:
    assert list(Meter(1, 0, 1).time_waits(range(5))) == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        list(Meter(1, 0, 1).time_waits(1 // x for x in [1, 0]))
