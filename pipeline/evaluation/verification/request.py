"""What the process of a verification gets, through a file without a name. Imports no torch.

A file that cannot be written is an OSError.
"""

import json
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np

from pipeline.evaluation.backends.base import Arrays, Found, Objects, Task

VERIFIED = "ap_verified"  # tag of an MLflow run: "pending", or a verdict's summary


@dataclass(frozen=True)
class Place:
    """Where a verdict is recorded; an empty field leaves that place out."""

    step: int = 0  # optimizer steps of the weights that were evaluated
    folder: str = ""  # the run's, path or URL
    run_id: str = ""  # MLflow's
    tracking_uri: str = ""
    split: str = "val"  # name of the data; the numbers are `<split>/AP` and so on

    @property
    def exists(self) -> bool:
        """Whether the verdict is recorded anywhere."""
        return bool(self.folder or (self.run_id and self.tracking_uri))

    @property
    def tag(self) -> str:
        """The MLflow run's tag."""
        return VERIFIED if self.split == "val" else f"{self.split}/{VERIFIED}"


@dataclass(frozen=True)
class Request:
    """An evaluation and its result."""

    task: Task
    arrays: Arrays  # of the backend
    scored: dict[str, float]  # its METRICS
    backend: str  # package and version
    place: Place


def write_request(file: IO[bytes], request: Request) -> None:
    """Write a request for `read_request`."""
    task = request.task
    header = {"images": task.images, "categories": task.categories, "limits": task.limits}
    header |= {"scored": request.scored, "backend": request.backend, "place": asdict(request.place)}
    groups = {"objects": task.objects, "found": task.found, "arrays": request.arrays}
    columns = {f"{name}.{key}": column for name, group in groups.items() for key, column in vars(group).items()}
    np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **columns)
    file.flush()


def read_request(file: IO[bytes]) -> Request:
    """Read what `write_request` wrote."""
    file.seek(0)
    groups: dict[str, dict[str, Any]] = {"objects": {}, "found": {}, "arrays": {}}
    with np.load(file, allow_pickle=False) as columns:
        header: dict[str, Any] = json.loads(columns["header"].tobytes())
        for name in columns.files:
            group, _, key = name.partition(".")
            if key:
                groups[group][key] = columns[name]
    objects, found = Objects(**groups["objects"]), Found(**groups["found"])
    task = Task(header["images"], header["categories"], objects, found, tuple(header["limits"]))
    return Request(task, Arrays(**groups["arrays"]), header["scored"], header["backend"], Place(**header["place"]))
