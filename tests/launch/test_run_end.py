"""Each way to end a run is in its record and in MLflow, and the caller gets the cause."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, OutOfMemoryError, RayActorError
from ray.train import ControllerError, WorkerGroupError
from support.state import STATE_OF_TEST

from pipeline import checkpoint
from pipeline.config import Config, dump
from pipeline.errors import ConfigError, NonFiniteError, PipelineError, PreemptedError
from pipeline.launch import run_end
from pipeline.launch.run_end import record_failure, reload_record
from pipeline.runs.record import FILE, RunRecord, read_run, write_run

NAME = "checkpoint_00000010_0123abcd"
CAUSES: list[tuple[BaseException, str, type[BaseException], str]] = [  # what is raised, status, what arrives, its text
    (WorkerGroupError("x", {1: NonFiniteError("bad loss")}), "FAILED", NonFiniteError, "bad loss"),
    (WorkerGroupError("x", {0: RuntimeError("gloo")}), "FAILED", PipelineError, "gloo"),
    (WorkerGroupError("x", {1: RayActorError()}), "FAILED", PipelineError, r"train\.micro_batch=1"),
    (ControllerError(ConfigError("fp16")), "FAILED", ConfigError, "fp16"),
    (ActorDiedError(), "FAILED", PipelineError, "--resume"),
    (RayActorError(), "FAILED", PipelineError, "--resume"),
    (OutOfMemoryError("7 workers were killed"), "FAILED", PipelineError, r"7 workers.*train\.micro_batch=1"),
    (GetTimeoutError("no answer"), "FAILED", PipelineError, "no answer"),
    (OSError("No space left on device"), "FAILED", PipelineError, "No space left on device"),
    (ValueError("a fault of this code"), "FAILED", ValueError, "a fault of this code"),
    (KeyboardInterrupt(), "KILLED", KeyboardInterrupt, "^$"),
    (SystemExit(0), "KILLED", KeyboardInterrupt, "^$"),
    (PreemptedError("stopped early"), "PREEMPTED", PreemptedError, "stopped early"),
]


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What MLflow was asked."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(run_end, "finish_run", lambda *arguments: calls.append(arguments))
    return calls


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    """As the driver wrote it at the start of a run that has a checkpoint since."""
    made = RunRecord("first", str(tmp_path / "first"), dump(Config()), "id")
    write_run(made)
    checkpoint.save(tmp_path / "first" / NAME, STATE_OF_TEST, {}, {})
    return made


def remove_record(record: RunRecord) -> None:
    (Path(record.folder) / FILE).unlink()


def damage_record(record: RunRecord) -> None:
    (Path(record.folder) / FILE).write_text("{")


def remove_folder(record: RunRecord) -> None:
    shutil.rmtree(record.folder)


def end(record: RunRecord, raised: BaseException, harm: Any = None) -> None:
    """A run that `raised` ends, after something has happened to its files."""
    with record_failure(record):
        if harm:
            harm(record)
        raise raised


@pytest.mark.parametrize("harm", [None, remove_record, damage_record, remove_folder])
@pytest.mark.parametrize(("raised", "status", "arrives", "text"), CAUSES)
def test_record_failure_records_the_end_and_raises_the_cause(
    raised: BaseException,
    status: str,
    arrives: type[BaseException],
    text: str,
    harm: Any,
    record: RunRecord,
    closed: list[tuple[Any, ...]],
) -> None:
    with pytest.raises(arrives, match=text) as caught:
        end(record, raised, harm)
    assert type(caught.value) is arrives
    found = read_run(record.folder)
    assert (found.status, found.run_id, found.config) == (status, "id", record.config)
    assert closed == [(record.config["tracking"]["uri"], "id", status)]


@pytest.mark.parametrize("raised", [ActorDiedError(), ValueError("first")])
def test_record_failure_with_a_full_disk_raises_the_cause(
    raised: Exception, record: RunRecord, closed: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(record: RunRecord) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(run_end, "write_run", full)
    with pytest.raises(Exception, match=r"--resume|first"):
        end(record, raised)
    assert [call[2] for call in closed] == ["FAILED"]


def test_record_failure_without_error_changes_nothing(record: RunRecord, closed: list[tuple[Any, ...]]) -> None:
    with record_failure(record):
        pass
    assert read_run(record.folder) == record
    assert closed == []


@pytest.mark.parametrize("harm", [remove_record, damage_record])
def test_reload_record_without_a_record_finds_the_newest_checkpoint(record: RunRecord, harm: Any) -> None:
    harm(record)
    assert reload_record(record).last == f"{record.folder}/{NAME}"
