"""A second start beside a running sweep is refused, and one that has lost its lock writes no ledger."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from support.data import write_shards
from support.sweeps import Play, make_space
from support.waiting import wait_until

from jobs.cli import main
from pipeline.errors import RunError, SweepError
from pipeline.files import folder_lock
from pipeline.files.folder_lock import FILE as LOCK
from pipeline.files.folder_lock import FolderLock, Owner
from tune.load import load_space
from tune.search.ledger import FILE, read_ledger, write_ledger
from tune.space import Space
from tune.sweep import build_parser, run
from tune.trials.check import CheckedSweep, check_sweep, find_ledger
from tune.trials.lock import hold_sweep


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"SETTLE": 0.0, "RENEW": 0.05, "POLL": 0.05, "SILENT": 0.5}.items():
        monkeypatch.setattr(folder_lock, f"{name}_SECONDS", seconds)


def checked_in(folder: Path) -> CheckedSweep:
    """A sweep that has not started."""
    space = make_space({})
    base = space.base.model_copy(update={"storage": str(folder)})
    return CheckedSweep(Space(base, space.search, space.axes), Play(space).sweep.ledger)


def test_sweep_command_beside_a_running_sweep_exits_2_and_names_its_process(
    space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = len(write_shards(tmp_path).categories)
    data = [f"data.{split}={tmp_path}/shards" for split in ("train", "val")]
    settings = [*data, f"model.num_classes={classes}", "data.tail=wrap", "model.backbone.weights=none"]
    settings += [f"storage={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    checked = check_sweep(load_space(space_file, settings))
    folder = tmp_path / "runs/sweep"
    monkeypatch.setattr("tune.trials.whole.sweep", lambda checked, write: write(str(folder), checked.ledger))
    with hold_sweep(checked) as write:
        write(str(folder), checked.ledger)
        before = (folder / FILE).read_bytes()
        for resume in ([], ["--resume"], ["--resume=auto"]):
            assert main(build_parser(), run, [str(space_file), *settings, *resume]) == 2
            said = capsys.readouterr().err
            assert f"process {os.getpid()} on {os.uname().nodename}" in said
            assert "--resume" in said
        assert (folder / FILE).read_bytes() == before
    assert main(build_parser(), run, [str(space_file), *settings, "--resume"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["report", FILE]


@pytest.mark.parametrize("resume", ["no", "must", "auto"])
def test_find_ledger_with_the_lock_of_a_process_that_is_gone(tmp_path: Path, resume: str) -> None:
    """Killed before its first write: a new start. Killed later: a resume, and a start that is refused names it."""
    lock = FolderLock(str(tmp_path), print).__enter__()
    owner = folder_lock.read_owner(str(tmp_path))
    assert owner
    lock.__exit__(None, None, None)
    lock._own = replace(owner, born="1")
    lock._write()  # as another process left it that is gone now
    if resume != "must":
        assert find_ledger(str(tmp_path), resume) is None  # type: ignore[arg-type]
    ledger = Play(make_space({})).sweep.ledger
    write_ledger(str(tmp_path), ledger)
    if resume == "no":
        with pytest.raises(RunError, match=rf"process {os.getpid()} on .*--resume"):
            find_ledger(str(tmp_path), resume)  # type: ignore[arg-type]
    else:
        assert find_ledger(str(tmp_path), resume) == ledger  # type: ignore[arg-type]


def test_hold_sweep_that_ends_before_its_first_write_leaves_nothing(tmp_path: Path) -> None:
    with hold_sweep(checked_in(tmp_path / "sweep")):
        assert (tmp_path / "sweep" / LOCK).exists()
    assert not (tmp_path / "sweep").exists()


def test_hold_sweep_that_changed_after_its_checks_is_refused(tmp_path: Path) -> None:
    checked = checked_in(tmp_path)
    write_ledger(str(tmp_path), checked.ledger)  # another process came, and ended
    with pytest.raises(RunError, match="sweep"), hold_sweep(checked):
        pass


def test_hold_sweep_after_the_lock_was_lost_stops_and_writes_no_ledger(tmp_path: Path) -> None:
    checked, stopped = checked_in(tmp_path), []
    with hold_sweep(checked, lambda: stopped.append(True)) as write:
        write(str(tmp_path), checked.ledger)
        other = FolderLock(str(tmp_path), print)
        other._own = Owner("token", "other", "other 0 1", 12, "7", "2026-01-01 00:00:00 UTC")
        wait_until(lambda: stopped, other._write)  # again, because a renewal that has begun replaces it
        with pytest.raises(SweepError, match="process 12 on other"):
            write(str(tmp_path), replace(checked.ledger, seconds=1.0))
    assert len(stopped) == 1
    assert read_ledger(str(tmp_path)) == checked.ledger
