"""Which lines of workers are shown, and which are kept in the file."""

from pathlib import Path
from typing import Any

import pytest
from support.ray_internals import output_dispatcher as dispatcher

from pipeline.launch.ray_internals import OUTPUT_HANDLER
from pipeline.launch.worker_output import FILE, WorkerOutput, filter_output

TRACEBACK = """Error in training function:
Traceback (most recent call last):
  File "/somewhere/worker.py", line 60, in train_worker
    raise OSError("full")
OSError: full

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/somewhere/worker.py", line 61, in train_worker
    run()
    ~~~^^
pipeline.errors.StorageError: no room

""".splitlines()
NOISE = [
    "[2026-11-29 13:58:34,753 E 24228 24481] core_worker.cc:2465: Actor with class name: 'PreemptionWatcher' and ID",
    "[2026-11-29 13:58:38,877] [WARNING] [real_accelerator.py:213:get_accelerator] Setting accelerator to CPU.",
    "WARNING:matplotlib.font_manager:fontManager is being rebuilt",
]
DEATH = [
    "Graceful shutdown of backend failed. This is expected if one of the workers has crashed.",
    "\tactor_id: f1d14a6b435e5929f78f728b01000000",
]


def shown(*batches: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    output = WorkerOutput(lambda batch: lines.extend(batch["lines"]))
    for batch in batches:
        output({"ip": "10.0.0.1", "is_err": True, **batch})
    return lines


def test_worker_output_shows_sentences_and_hides_tracebacks_and_noise() -> None:
    said = ["each step: 4 images", "resumed at epoch 2"]
    assert shown({"pid": 1, "lines": [said[0], *NOISE, *DEATH, *TRACEBACK, said[1]]}) == said


@pytest.mark.parametrize("cut", range(1, len(TRACEBACK)))
def test_worker_output_hides_a_traceback_in_two_batches_beside_another_process(cut: int) -> None:
    first, second = TRACEBACK[:cut], TRACEBACK[cut:]
    batches = ({"pid": 1, "lines": first}, {"pid": 2, "lines": ["another rank"]}, {"pid": 1, "lines": [*second, "end"]})
    assert shown(*batches) == ["another rank", "end"]


def test_worker_output_write_keeps_every_line(tmp_path: Path) -> None:
    output = WorkerOutput(lambda batch: None)
    output({"pid": 7, "ip": "10.0.0.1", "actor_name": "RayTrainWorker", "lines": TRACEBACK})
    path = output.write(str(tmp_path))
    assert path == str(tmp_path / FILE)
    kept = Path(path).read_text(encoding="utf-8").splitlines()
    assert kept == [f"(RayTrainWorker pid=7, ip=10.0.0.1) {line}" for line in TRACEBACK]


def test_worker_output_write_on_a_full_disk_does_not_raise(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    assert WorkerOutput(lambda batch: None).write(str(tmp_path / "a file" / "below")) == ""


def test_filter_output_stands_before_rays_handler_and_gives_it_back() -> None:
    got: list[dict[str, Any]] = []
    before = list(dispatcher.handlers)
    dispatcher.remove_handler(OUTPUT_HANDLER)
    dispatcher.add_handler(OUTPUT_HANDLER, got.append)
    try:
        with filter_output():
            dispatcher.emit({"pid": 1, "lines": [*NOISE, "a sentence"]})
        dispatcher.emit({"pid": 1, "lines": NOISE[:1]})
    finally:
        dispatcher.remove_handler(OUTPUT_HANDLER)
        for name, handler in before:
            if name == OUTPUT_HANDLER:
                dispatcher.add_handler(name, handler)
    assert [batch["lines"] for batch in got] == [["a sentence"], NOISE[:1]]


def test_filter_output_without_rays_handler_changes_nothing() -> None:
    before = list(dispatcher.handlers)
    if any(name == OUTPUT_HANDLER for name, _ in before):
        pytest.skip("a Ray of another test is connected")
    with filter_output():
        assert list(dispatcher.handlers) == before


@pytest.mark.parametrize(
    ("lines", "faults"), [(NOISE, False), (["a sentence"], False), (DEATH, True), (TRACEBACK, True)]
)
def test_worker_output_knows_whether_it_hid_faults(lines: list[str], faults: bool) -> None:
    output = WorkerOutput(lambda batch: None)
    output({"pid": 1, "ip": "10.0.0.1", "lines": lines})
    assert output.hid_faults is faults
