"""A verification finds a planted wrong backend, waits for nobody, and leaves nothing behind when it is killed."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.coco_reference import imperfect, reference
from support.paths import ASSETS, ROOT
from support.waiting import wait_until

from pipeline.evaluation import coco
from pipeline.evaluation.backends.base import Arrays, Task
from pipeline.evaluation.backends.hotcoco import Hotcoco
from pipeline.evaluation.coco import METRICS, Scores, coco_scores, ground_truth_of_file
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.verification import start
from pipeline.evaluation.verification.process import score_in_chunks
from pipeline.evaluation.verification.request import VERIFIED, Place
from pipeline.evaluation.verification.start import Verification, settle, start_verification, verified
from pipeline.runs.evaluations import Evaluation, read_evaluations, write_evaluations
from pipeline.runs.record import RunRecord, read_run, write_run
from pipeline.runs.verifications import read_verdicts
from pipeline.tracking.client import connect
from pipeline.tracking.store import TrackingStore

SECONDS = 60.0  # far above what a small verification takes on a busy machine
Case = tuple[dict[str, Any], Detections]


class Wrong(Hotcoco):
    """hotcoco with precisions that are too low."""

    def run(self, task: Task) -> Arrays:
        arrays = super().run(task)
        precision = arrays.precision.copy()
        precision[precision > 0] *= 0.999
        return replace(arrays, precision=precision)


@pytest.fixture(autouse=True)
def usual_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other tests a process of the lowest priority may wait for minutes."""
    monkeypatch.setattr(start, "NICENESS", 0)


@pytest.fixture(scope="module")
def case() -> Case:
    truth = ground_truth_of_file(ASSETS / "coco_small" / "annotations.json")
    return truth, imperfect(truth, 20, seed=0)


@pytest.fixture(scope="module")
def right(case: Case) -> Scores:
    return coco_scores(*case)


@pytest.fixture
def wrong(case: Case, monkeypatch: pytest.MonkeyPatch) -> Scores:
    monkeypatch.setattr(coco, "load_backend", lambda _: Wrong())
    return coco_scores(*case)


def test_settle_equal_bits_are_reported_without_a_warning(right: Scores, caplog: pytest.LogCaptureFixture) -> None:
    verdict = settle(start_verification(right, Place()), SECONDS)
    assert verdict is not None
    assert verdict.differences == []
    assert verdict.metrics == right.metrics
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_verified_wrong_backend_gets_the_numbers_of_pycocotools(
    case: Case, wrong: Scores, caplog: pytest.LogCaptureFixture
) -> None:
    stands = verified(wrong, seconds=SECONDS)
    numbers, arrays = reference(case[0], case[1].to_results())
    assert list(stands.metrics.values()) == numbers
    assert stands.arrays.differences(arrays) == []
    assert "precision" in caplog.text
    assert "stand" in caplog.text


def run_with_wrong_row(tmp_path: Path, scores: Scores) -> tuple[Place, Any]:
    """A run's folder and MLflow run, that hold the backend's numbers."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(TrackingStore(store), create=True)
    run_id = client.create_run(client.create_experiment("verification")).info.run_id
    folder = tmp_path / "run"
    write_run(RunRecord("run", str(folder), {}, run_id))
    (folder / "checkpoint_00000009_00000000").mkdir()
    row = {"epoch": 0.0, "step": 9.0, **scores.metrics}
    write_evaluations(str(folder), [Evaluation("checkpoint_00000009_00000000", row)])
    return Place(9, str(folder), run_id, store), client


@pytest.mark.slow
def test_verification_planted_difference_changes_run_and_mlflow(tmp_path: Path, wrong: Scores) -> None:
    place, client = run_with_wrong_row(tmp_path, wrong)
    assert read_run(place.folder).metrics["val/AP"] == wrong.metrics["AP"]
    verdict = settle(start_verification(wrong, place), SECONDS)
    assert verdict is not None
    assert verdict.differences == ["precision"]
    assert verdict.metrics["AP"] != wrong.metrics["AP"]
    wait_until(lambda: "differs" in client.get_run(place.run_id).data.tags.get(VERIFIED, ""))
    logged = client.get_run(place.run_id).data.metrics
    assert {name: logged[f"val/{name}"] for name in METRICS} == verdict.metrics
    assert read_verdicts(place.folder) == [verdict]
    assert read_run(place.folder).metrics["val/AP"] == verdict.metrics["AP"]
    assert read_evaluations(place.folder)[0].entry.items() >= verdict.metrics.items()


STARTER = """
import os, pickle, sys
from pipeline.evaluation.verification.request import Request
from pipeline.evaluation.verification.start import Verification
Verification(pickle.loads(sys.stdin.buffer.read()))
os._exit(0)
"""


@pytest.mark.slow
def test_verification_outlives_its_starter(tmp_path: Path, right: Scores) -> None:
    import pickle

    place, client = run_with_wrong_row(tmp_path, right)
    request = pickle.dumps(start.Request(right.task, right.arrays, right.metrics, "hotcoco 1.3.0", place))
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", STARTER], input=request, cwd=ROOT, check=True)
    assert not read_verdicts(place.folder)
    assert time.monotonic() - begin < SECONDS
    wait_until(lambda: "equals" in client.get_run(place.run_id).data.tags.get(VERIFIED, ""))
    assert read_verdicts(place.folder)[0].differences == []


def process_of(verification: Verification) -> int:
    """The id of the process that writes into the verification's pipe."""
    pipe = os.stat(verification._pipe).st_ino
    for path in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if path.stat().st_ino == pipe and b"verification.process" in (path.parents[1] / "cmdline").read_bytes():
                return int(path.parents[1].name)
        except OSError:
            continue
    return 0


def test_wait_of_a_stopped_and_killed_process_is_bounded(tmp_path: Path, right: Scores) -> None:
    write_run(RunRecord("run", str(tmp_path / "run"), {}))
    verification = start_verification(right, Place(9, str(tmp_path / "run")))
    assert verification is not None
    wait_until(lambda: process_of(verification))
    pid = process_of(verification)
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert verification.wait(0.2) is None
    assert time.monotonic() - begin < 5
    os.kill(pid, signal.SIGKILL)
    assert sorted(os.listdir(tmp_path / "run")) == ["run.json"]


def test_settle_killed_process_ends_at_once_with_a_warning(right: Scores, caplog: pytest.LogCaptureFixture) -> None:
    verification = start_verification(right, Place())
    assert verification is not None
    wait_until(lambda: process_of(verification))
    os.kill(process_of(verification), signal.SIGKILL)
    assert settle(verification, SECONDS) is None
    assert "died" in caplog.text


def test_process_without_a_place_ends_when_nobody_waits(right: Scores) -> None:
    verification = start_verification(right, Place())
    assert verification is not None
    wait_until(lambda: process_of(verification))
    pid = process_of(verification)
    os.kill(pid, signal.SIGSTOP)
    assert verification.wait(0) is None
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_start_verification_that_cannot_start_is_a_warning(
    right: Scores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    descriptors = os.listdir("/proc/self/fd")
    assert start_verification(right, Place()) is None
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert "No space left" in caplog.text
    assert settle(None) is None


def test_start_verification_of_pycocotools_itself_is_none(case: Case) -> None:
    assert start_verification(coco_scores(*case, backend="pycocotools"), Place()) is None


@pytest.mark.parametrize("categories", [1, 2, 100])
def test_score_in_chunks_has_the_bits_of_one_evaluation(case: Case, right: Scores, categories: int) -> None:
    assert score_in_chunks(right.task, categories).differences(right.arrays) == []


def test_request_crosses_the_file_unchanged(right: Scores) -> None:
    from pipeline.evaluation.verification.request import Request, read_request, write_request

    request = Request(right.task, right.arrays, right.metrics, "hotcoco 1.3.0", Place(3, "s3://bucket/run", "abc", "x"))
    with tempfile.TemporaryFile() as file:
        write_request(file, request)
        read = read_request(file)
    assert read.arrays.differences(request.arrays) == []
    assert (read.scored, read.backend, read.place) == (request.scored, request.backend, request.place)
    assert json.dumps(read.task.found.annotations()) == json.dumps(request.task.found.annotations())
    assert read.task.objects.annotations() == request.task.objects.annotations()
    assert (read.task.images, read.task.categories, read.task.limits) == (
        request.task.images,
        request.task.categories,
        request.task.limits,
    )
