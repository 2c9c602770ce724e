"""One driver at a time runs a run: a second start is refused, and one that has lost its run writes no more. No Ray."""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.data import write_shards
from support.helpers import tiny_run
from support.waiting import wait_until

from jobs import train as command
from jobs.cli import main
from pipeline.config import Config, load_config
from pipeline.errors import LostRunError, RunError
from pipeline.files import folder_lock
from pipeline.files.folder_lock import FILE, VERSION, FolderLock, Owner, read_owner
from pipeline.launch import driver, run_end, run_lock
from pipeline.launch.driver import train
from pipeline.launch.interrupt import run_interruptible
from pipeline.launch.preflight import CheckedRun, check_run
from pipeline.launch.resume_check import Resume
from pipeline.launch.run_end import record_failure
from pipeline.launch.run_lock import hold_run
from pipeline.runs.record import FILE as RECORD
from pipeline.runs.record import RunRecord, read_record, write_run

WAIT_SECONDS = 30.0
ELSEWHERE = Owner("token", "other", "other 0 1", 12, "7", "2026-01-01 00:00:00 UTC")


class ReachedError(Exception):
    """The driver is about to start Ray."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"SETTLE": 0.0, "RENEW": 0.05, "POLL": 0.05, "SILENT": 0.5}.items():
        monkeypatch.setattr(folder_lock, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.05)


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Overrides of a preset: a run `first` on shards that exist."""
    classes = len(write_shards(tmp_path).categories)
    data = [f"data.{split}={tmp_path}/shards" for split in ("train", "val")]
    model = [f"model.num_classes={classes}", "model.backbone.weights=none", "data.tail=wrap"]
    return [*data, *model, "name=first", f"storage={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]


@pytest.fixture
def config(settings: list[str]) -> Config:
    return load_config("jobs/configs/demo.yaml", settings)


@pytest.fixture
def starts_ray(monkeypatch: pytest.MonkeyPatch) -> list[Owner | None]:
    """The owner of the run's lock each time that the driver would have started Ray."""
    owners: list[Owner | None] = []

    def stop() -> None:
        owners.append(read_owner("runs/first") if Path("runs").exists() else None)
        raise ReachedError

    monkeypatch.setattr(driver, "start_ray", stop)
    return owners


def write_owner(folder: Path, owner: Owner) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps({"version": VERSION, **asdict(owner)}))


def killed_owner() -> Owner:
    """A driver of this machine that was killed."""
    return replace(FolderLock("unused", print)._own, born="1")


def test_train_holds_the_lock_before_it_starts_ray_and_leaves_nothing_behind(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts_ray: list[Owner | None]
) -> None:
    checked = check_run(config)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReachedError):
        train(config, checked=checked)
    assert [owner and owner.pid for owner in starts_ray] == [os.getpid()]
    assert not Path("runs").exists()


@pytest.mark.parametrize("arguments", [["--resume"], ["--resume=auto"], []], ids=["must", "auto", "no"])
def test_train_command_beside_a_driver_of_the_run_exits_2_and_names_its_process(
    settings: list[str],
    config: Config,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With every file as it was."""
    monkeypatch.setattr(driver, "start_ray", lambda: pytest.fail("Ray was started"))
    folder = tmp_path / "runs" / "first"
    record = tiny_run(folder, check_run(config).config)
    write_run(replace(record, status="RUNNING", last=None, best=None))
    monkeypatch.setattr(folder_lock, "RENEW_SECONDS", 3600.0)
    with FolderLock(str(folder), print):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert main(command.build_parser(), command.run, ["demo", *settings, *arguments]) == 2
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    said = capsys.readouterr().err
    assert f"process {os.getpid()} on {os.uname().nodename}" in said
    assert ("run the same command again" if "auto" in str(arguments) else "continue with --resume") in said


def test_train_first_start_beside_another_one_is_refused(config: Config, tmp_path: Path) -> None:
    """The other one has not written its record yet: both have found the name free."""
    checked = check_run(config)
    folder = tmp_path / "runs" / "first"
    with FolderLock(str(folder), print), pytest.raises(RunError, match=f"process {os.getpid()} on"):
        train(config, checked=checked)


def test_train_after_another_one_has_started_and_ended_meanwhile_checks_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts_ray: list[Owner | None]
) -> None:
    """Both have found the name free, or the same checkpoint to continue from."""
    checked = check_run(config)
    record = tiny_run(tmp_path / "runs" / "first", checked.config)
    write_run(record)
    with pytest.raises(RunError, match="exists already"):
        train(config, checked=checked)
    assert starts_ray == []
    found: list[RunRecord | None] = []

    def check_again(config: Config, resume: Resume) -> CheckedRun:
        found.append((again := check_run(config, resume)).previous)
        return again

    monkeypatch.setattr(driver, "check_run", check_again)
    for stale in (None, replace(record, last=None)):
        with pytest.raises(ReachedError):
            train(config, resume="must", checked=replace(checked, previous=stale))
    assert found == [record, record]
    with pytest.raises(ReachedError):
        train(config, resume="must", checked=replace(checked, previous=record))
    assert len(found) == 2


@pytest.mark.parametrize("owner", [killed_owner(), ELSEWHERE], ids=["here", "elsewhere"])
def test_train_after_a_killed_driver_takes_its_lock(
    config: Config, owner: Owner, tmp_path: Path, starts_ray: list[Owner | None]
) -> None:
    """As Ray's retry of a job does, on the same machine or on another one."""
    checked = check_run(config)
    folder = tmp_path / "runs" / "first"
    write_owner(folder, owner)
    with pytest.raises(ReachedError):
        train(config, checked=checked)
    assert not folder.exists()


def test_train_with_patience_waits_for_the_end_of_a_driver(
    config: Config, tmp_path: Path, starts_ray: list[Owner | None]
) -> None:
    """A trial waits for that of a sweep that was killed, instead of failing."""
    checked = check_run(config)
    folder = tmp_path / "runs" / "first"
    other = FolderLock(str(folder), print)
    other.__enter__()
    with pytest.raises(RunError, match="in use"):
        train(config, checked=checked, patience=0.3)
    other._closing.set()  # its thread renews the lock no more
    other._thread.join()
    write_owner(folder, killed_owner())
    with pytest.raises(ReachedError):
        train(config, checked=checked, patience=WAIT_SECONDS)


def test_hold_run_within_the_same_process_goes_on_holding_it(tmp_path: Path) -> None:
    """`jobs.finetune` holds it through its stages, of which the training is one."""
    folder = str(tmp_path / "first")
    with hold_run(folder, "auto") as held:
        with hold_run(folder, "auto") as again:
            assert again is held
        assert read_owner(folder)
    assert not Path(folder).exists()


def test_run_that_another_process_has_taken_over_ends_and_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends without waiting for Ray, whose workers may run on."""
    monkeypatch.setattr(run_end, "finish_run", lambda *_: pytest.fail("MLflow was asked"))
    monkeypatch.setattr("pipeline.launch.interrupt.POLL_SECONDS", 0.05)
    folder = tmp_path / "first"
    record = replace(tiny_run(folder), status="RUNNING")
    write_run(record)
    began = time.monotonic()

    def take_over_and_train() -> None:
        wait_until(lambda: held._taker, lambda: write_owner(folder, ELSEWHERE))  # again, because a renewal replaces it
        time.sleep(WAIT_SECONDS)

    with (
        hold_run(str(folder), "must") as held,
        pytest.raises(LostRunError, match="process 12 on other"),
        record_failure(record),
        held.checked(),
    ):
        run_interruptible(take_over_and_train, lambda _: None, held.check)
    assert time.monotonic() - began < WAIT_SECONDS
    assert read_record(str(folder)).status == "RUNNING"
    assert read_owner(str(folder)) == ELSEWHERE
    assert (folder / RECORD).exists()


@pytest.mark.parametrize("error", [RuntimeError("a worker died"), KeyboardInterrupt(), None])
def test_run_that_another_process_has_taken_over_says_so_however_it_ends(
    tmp_path: Path, error: BaseException | None
) -> None:
    held = run_lock.HeldRun(str(tmp_path))
    held.lose(ELSEWHERE)

    def end() -> None:
        if error:
            raise error

    with pytest.raises(LostRunError), held.checked():
        end()
