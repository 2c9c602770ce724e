"""The process of a verification, see `start.py`: `python -m pipeline.evaluation.verification.process FILE NICENESS`.

It writes the verdict to standard output, if somebody still reads it, and records it. A place that cannot be written is
left out. It ends with an error, which nobody sees, if the request cannot be read.
"""

import contextlib
import json
import os
import select
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.evaluation.backends.base import Arrays, Found, Objects, Task
from pipeline.evaluation.backends.pycocotools import Pycocotools
from pipeline.evaluation.summary import summarise
from pipeline.evaluation.verification.request import Place, Request, read_request
from pipeline.runs.evaluations import read_history
from pipeline.runs.record import run_exists
from pipeline.runs.verifications import Verdict, write_verdict
from pipeline.tracking.api import TrackingClient
from pipeline.tracking.client import await_answer, connect
from pipeline.tracking.evaluations import correct_evaluation

PENDING = "pending"
STDOUT = 1  # the starter's pipe
CHUNK_CATEGORIES = 8  # scored at a time: categories do not depend on each other, and memory grows with their number


def main(descriptor: int, niceness: int) -> None:
    """Verify the request in the file behind `descriptor`, which the starter has opened."""
    os.nice(niceness)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb") as file:
        file.write(b"1000")  # if memory runs out, Linux ends this process and not the training
    with os.fdopen(descriptor, "rb") as request_file:
        request = read_request(request_file)
    if not request.place.exists:
        threading.Thread(target=end_with_reader, daemon=True).start()
    opened = ThreadPoolExecutor(1).submit(open_run, request.place)  # MLflow takes seconds to load and to answer
    verdict = verify(request)
    with contextlib.suppress(BrokenPipeError):
        os.write(STDOUT, json.dumps(asdict(verdict)).encode())
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # the starter need not wait for the records
    record(verdict, request.place, opened.result())


def end_with_reader() -> None:
    """End this process when nobody reads its output any more, because its verdict would reach nobody."""
    reader = select.poll()
    reader.register(STDOUT, 0)
    reader.poll()
    os._exit(1)


def verify(request: Request) -> Verdict:
    """Score the request with pycocotools, and compare."""
    arrays = score_in_chunks(request.task)
    return Verdict(
        step=request.place.step,
        backend=request.backend,
        reference=f"pycocotools {version('pycocotools')}",
        differences=arrays.differences(request.arrays),
        scored=request.scored,
        metrics=summarise(arrays),
    )


def score_in_chunks(task: Task, categories: int = CHUNK_CATEGORIES) -> Arrays:
    """The arrays of pycocotools, computed for a few categories at a time: the same bits in less memory."""
    parts = []
    for first in range(1, task.categories + 1, categories):
        last = min(first + categories - 1, task.categories)
        objects = Objects(*_select(task.objects, first, last))
        found = Found(*_select(task.found, first, last))
        part = replace(task, categories=last - first + 1, objects=objects, found=found)
        parts.append(Pycocotools().run(part))
    return Arrays(
        np.concatenate([part.precision for part in parts], axis=2),
        np.concatenate([part.recall for part in parts], axis=1),
        np.concatenate([part.scores for part in parts], axis=2),
    )


def _select(group: Objects | Found, first: int, last: int) -> list[Any]:
    """The columns of the rows of categories `first` to `last`, which become 1 and so on."""
    rows = (group.categories >= first) & (group.categories <= last)
    columns = {key: column[rows] for key, column in vars(group).items()}
    return list((columns | {"categories": columns["categories"] - (first - 1)}).values())


def open_run(place: Place) -> TrackingClient | None:
    """A client of the store that has the run of `place`, now tagged PENDING; None if there is none."""
    if not (place.run_id and place.tracking_uri):
        return None
    with contextlib.suppress(Exception):  # MLflow raises errors of its own, of its database and of its server
        await_answer(place.tracking_uri)
        client = connect(place.tracking_uri)
        client.set_tag(place.run_id, place.tag, PENDING)
        return client
    return None


def record(verdict: Verdict, place: Place, client: TrackingClient | None) -> None:
    """Write the verdict into the run's folder and its MLflow run, there with the numbers that stand."""
    known = False
    with contextlib.suppress(PipelineError, OSError):
        if place.folder and (known := run_exists(place.folder)):  # it may have been removed
            write_verdict(place.folder, verdict)
    if client is None:
        return
    if verdict.differences:
        wrong, right = (
            {f"{place.split}/{name}": value for name, value in numbers.items()}
            for numbers in (verdict.scored, verdict.metrics)
        )
        if known:
            earlier = (row["AP"] for row in read_history(place.folder, place.step - 1))
            right["val/AP_best"] = max([verdict.metrics["AP"], *earlier])
        with contextlib.suppress(Exception):  # see `open_run`; the tag says in any case which numbers stand
            correct_evaluation(client, place.run_id, place.step, wrong, right)
    client.set_tag(place.run_id, place.tag, verdict.summary)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
