"""What the runs of trials have on disk: recovery after a kill, checkpoints of trials that have lost, open runs."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.sweeps import make_space

from pipeline.errors import RunError
from pipeline.runs.evaluations import Evaluation, read_evaluations, write_evaluations
from pipeline.runs.record import CHECKPOINT_LIST, RunRecord, read_record, read_run, write_run
from tune.search.ledger import Ledger, add_point, add_report, end_trial, new_ledger, read_report, start_trial
from tune.trials import on_disk


def write_trial(folder: Path, name: str, aps: list[float], status: str = "RUNNING") -> Path:
    """A run with one checkpoint an epoch."""
    run = folder / name
    names = [f"checkpoint_{step:08d}_0123abcd" for step in range(1, len(aps) + 1)]
    for each in names:
        (run / each).mkdir(parents=True)
    rows = [Evaluation(each, {"epoch": i, "step": i + 1, "AP": aps[i]}) for i, each in enumerate(names)]
    write_evaluations(str(run), rows)
    write_run(RunRecord(name, str(run), {}, "id", status, last=str(run / names[-1]) if names else None))
    return run


def ledger_of(points: int) -> Ledger:
    space = make_space({"samples": points})
    ledger = new_ledger(space, {})
    for point in range(points):
        ledger = start_trial(add_point(ledger, "sweep", point, {"optim.lr": 1e-4}, 1), f"sweep-{point:03d}")
    return ledger


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint_*"))


def test_recover_reads_what_the_runs_did_after_the_ledger(tmp_path: Path) -> None:
    write_trial(tmp_path, "sweep-000", [0.1, 0.3], "FINISHED")
    write_trial(tmp_path, "sweep-001", [0.2])
    ledger = on_disk.recover(make_space({"samples": 3}), ledger_of(3), str(tmp_path))
    assert [trial.status for trial in ledger.trials] == ["finished", "waiting", "waiting"]
    assert [(row.trial, row.epoch, row.score) for row in ledger.reports] == [
        ("sweep-000", 1, 0.1),
        ("sweep-000", 2, 0.3),
        ("sweep-001", 1, 0.2),
    ]
    assert on_disk.recover(make_space({"samples": 3}), ledger, str(tmp_path)) == ledger


def test_losing_trials_are_those_that_ended_outside_of_the_best_point() -> None:
    ledger = ledger_of(4)
    for name, score in (("sweep-000", 0.2), ("sweep-001", 0.4), ("sweep-002", 0.9)):
        report = read_report(name, {"epoch": 0, "step": 1, "AP": score}, "val/AP")
        assert report
        ledger = add_report(ledger, report)
    for name in ("sweep-000", "sweep-001"):
        ledger = end_trial(ledger, name, "finished")
    ledger = end_trial(ledger, "sweep-003", "failed")
    assert on_disk.losing_trials(ledger) == ["sweep-000", "sweep-003"]  # sweep-002 is still running


@pytest.mark.parametrize(("aps", "kept"), [([0.1, 0.3, 0.2], 2), ([-1.0, -1.0], 2)])
def test_keep_best_checkpoint_leaves_one_that_the_record_names(tmp_path: Path, aps: list[float], kept: int) -> None:
    run = write_trial(tmp_path, "sweep-000", aps, "FINISHED")
    on_disk.keep_best_checkpoint(str(run))
    assert checkpoints(run) == [f"checkpoint_{kept:08d}_0123abcd"]
    assert read_run(str(run)).checkpoint == read_record(str(run)).last == f"{run}/{checkpoints(run)[0]}"
    on_disk.keep_best_checkpoint(str(run))
    assert len(checkpoints(run)) == 1


def test_keep_best_checkpoint_without_run_or_checkpoint_does_nothing(tmp_path: Path) -> None:
    on_disk.keep_best_checkpoint(str(tmp_path / "none"))
    run = write_trial(tmp_path, "sweep-000", [])
    on_disk.keep_best_checkpoint(str(run))
    assert checkpoints(run) == []


def test_close_ended_runs_sets_the_status_of_open_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(on_disk, "finish_run", lambda uri, run_id, status: closed.append(status))
    for number, status in enumerate(("RUNNING", "RUNNING", "FINISHED")):
        write_trial(tmp_path, f"sweep-{number:03d}", [0.1], status)
    ledger = end_trial(ledger_of(4), "sweep-001", "failed")
    ledger = end_trial(ledger, "sweep-002", "finished")
    on_disk.close_ended_runs(ledger, str(tmp_path), "")
    found = [read_record(str(tmp_path / f"sweep-{number:03d}")).status for number in range(3)]
    assert found == ["KILLED", "FAILED", "FINISHED"]
    assert closed == ["KILLED", "FAILED"]


def test_take_checkpoint_leaves_that_of_the_donor_alone(tmp_path: Path) -> None:
    donor, taker = (
        write_trial(tmp_path, "a", [0.1, 0.4], "FINISHED"),
        write_trial(tmp_path, "b", [0.3, 0.2], "FINISHED"),
    )
    (donor / "checkpoint_00000002_0123abcd").rename(donor / "checkpoint_00000002_feedfeed")
    newest = donor / "checkpoint_00000002_feedfeed"
    (newest / "weights").write_text("of a")
    rows = read_evaluations(str(donor))
    write_evaluations(str(donor), [rows[0], replace(rows[1], checkpoint=newest.name)])
    write_run(replace(read_record(str(donor)), last=str(newest)))
    (taker / CHECKPOINT_LIST).write_text("{}")
    for _ in range(2):  # also after a kill in the middle
        on_disk.take_checkpoint(str(donor), str(taker))
        assert checkpoints(taker) == [newest.name]
        assert (taker / newest.name / "weights").read_text() == "of a"
        assert not (taker / CHECKPOINT_LIST).exists()
        assert [(row.checkpoint, row.entry["AP"]) for row in read_evaluations(str(taker))] == [
            ("", 0.3),
            (newest.name, 0.4),
        ]
        assert read_record(str(taker)).last == f"{taker}/{newest.name}"
    assert len(checkpoints(donor)) == 2


def test_take_checkpoint_from_a_run_without_one_raises(tmp_path: Path) -> None:
    write_trial(tmp_path, "a", [])
    taker = write_trial(tmp_path, "b", [0.3])
    with pytest.raises(RunError, match=str(tmp_path / "a")):
        on_disk.take_checkpoint(str(tmp_path / "a"), str(taker))
    assert len(checkpoints(taker)) == 1
