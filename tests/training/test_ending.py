"""When a run ends early by its own settings: patience as a function of evaluations, the clock over several starts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.ending import FILE, SAVE_SECONDS, Clock, is_out_of_patience

SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.1, 0.2, 0.3]), max_size=12)


def history(scores: list[float]) -> tuple[dict[str, float], ...]:
    return tuple({"epoch": float(k), "step": float(k), "AP": score} for k, score in enumerate(scores))


def first_end(scores: list[float], patience: int) -> int | None:
    """The number of evaluations after which a run that is never stopped ends."""
    return next((k for k in range(1, len(scores) + 1) if is_out_of_patience(history(scores[:k]), patience)), None)


@given(SCORES, st.integers(1, 4))
def test_patience_ends_after_so_many_evaluations_without_a_higher_ap(scores: list[float], patience: int) -> None:
    best, since = None, 0
    expected = None
    for count, score in enumerate(scores, start=1):
        better = best is None or score > best
        best, since = (score, 0) if better else (best, since + 1)
        if since == patience:
            expected = count
            break
    assert first_end(scores, patience) == expected


def test_patience_none_never_ends() -> None:
    assert not is_out_of_patience(history([0.5] * 20), None)


class Time:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_clock_counts_all_starts_and_loses_a_minute_at_most_when_killed(tmp_path: Path) -> None:
    time = Time()
    first = Clock(str(tmp_path), 10, time)
    time.now += 5 * 60
    assert not first.is_over()  # writes
    time.now += SAVE_SECONDS - 1  # lost: the process is killed now
    second = Clock(str(tmp_path), 10, time)
    assert second.seconds == pytest.approx(5 * 60)
    time.now += 5 * 60
    assert second.is_over()
    second.save()
    assert Clock(str(tmp_path), 10, time).is_over()
    assert not Clock(str(tmp_path), 11, time).is_over()  # a longer limit continues


def test_clock_of_a_new_run_forgets_the_run_that_had_its_name(tmp_path: Path) -> None:
    time = Time()
    failed = Clock(str(tmp_path), 10, time)
    time.now += 9 * 60
    failed.save()
    Clock(str(tmp_path), 10, time).reset()
    assert Clock(str(tmp_path), 10, time).seconds == 0


def test_clock_without_a_limit_never_ends_and_writes_nothing(tmp_path: Path) -> None:
    time = Time()
    clock = Clock(str(tmp_path), None, time)
    time.now += 1e6
    assert not clock.is_over()
    clock.save()
    clock.reset()
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("content", ["", "{", '{"version": 7, "seconds": 1}', '{"version": 1}'])
def test_clock_with_a_damaged_file_counts_from_this_start(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_text(content)
    assert Clock(str(tmp_path), 1, Time()).seconds == 0
    assert FILE in caplog.text
