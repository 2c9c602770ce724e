"""What a prediction has done so far: files of consecutive images beside its output, so that a killed one continues.

A part is written as a whole when all of its images have a result. The folder belongs to one request, which its digest
identifies; parts of another request are removed. A folder that cannot be written is a StorageError, one that another
process uses a RunError.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.errors import RunError, StorageError, storage_error
from pipeline.files.atomic import write_file
from pipeline.files.scratch import lock_folder

PART_IMAGES = 64  # what is lost at most for each worker when a prediction is killed
REQUEST = "request.json"
OWN = re.compile(r"(\.[0-9a-f]{32}\.)?(request|part-\d+)\.json")
Row = dict[str, Any]  # an image's result, or its `fault`; ready for JSON


class PartFolder:
    """The parts of one request, as a context; `remove` deletes them when the output is written.

    Args:
        folder: of the parts.
        digest: of everything that the results depend on.
        images: number of images; each has a result in the end.
    """

    def __init__(self, folder: Path, digest: str, images: int) -> None:
        self._folder, self._digest, self._images = folder, digest, images
        self._descriptor: int | None = None
        self._open: dict[int, dict[int, Row]] = {}  # results of parts that are not complete
        self._done: set[int] = set()

    def __enter__(self) -> Self:
        """Take the folder, and remove parts of another request.

        Raises:
            RunError: another process works here.
            StorageError: it cannot be written, or holds other files.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = lock_folder(self._folder)
            if self._descriptor is None:
                raise RunError(f"{self._folder} is in use: another prediction writes there; choose another --out")
            if foreign := sorted(name for name in os.listdir(self._folder) if not OWN.fullmatch(name)):
                raise StorageError(
                    f"{self._folder} holds {foreign[0]}, which is not of a prediction; move it elsewhere"
                )
            if self._read(REQUEST) != {"digest": self._digest}:
                for path in self._folder.iterdir():
                    path.unlink()
                self._write(REQUEST, {"digest": self._digest})
        except OSError as error:
            raise self._failure(error) from None
        self._done = {part for part in range(self._parts) if self._is_whole(part)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def missing(self) -> list[int]:
        """The images without a result, in order."""
        return [image for part in range(self._parts) if part not in self._done for image in self._range(part)]

    def add(self, image: int, row: Row) -> None:
        """Keep an image's result; the last one of a part writes it. Raises StorageError."""
        part = image // PART_IMAGES
        rows = self._open.setdefault(part, {})
        assert part not in self._done, f"image {image} has two results"
        assert image not in rows, f"image {image} has two results"
        rows[image] = row
        if len(rows) < len(self._range(part)):
            return
        try:
            self._write(_name(part), [rows[number] for number in self._range(part)])
        except OSError as error:
            raise self._failure(error) from None
        self._done.add(part)
        del self._open[part]

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Each image with its result, in order; all must be there."""
        assert len(self._done) == self._parts, "images without a result"
        for part in range(self._parts):
            yield from zip(self._range(part), self._read(_name(part)), strict=True)

    def remove(self) -> None:
        """Delete the parts."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _parts(self) -> int:
        return -(-self._images // PART_IMAGES)

    def _range(self, part: int) -> range:
        return range(part * PART_IMAGES, min(self._images, (part + 1) * PART_IMAGES))

    def _is_whole(self, part: int) -> bool:
        rows = self._read(_name(part))
        return isinstance(rows, list) and len(rows) == len(self._range(part))

    def _read(self, name: str) -> Any:
        """The content of a file; None if it is missing or damaged."""
        try:
            return json.loads((self._folder / name).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _write(self, name: str, content: object) -> None:
        write_file(self._folder / name, json.dumps(content, separators=(",", ":")).encode())

    def _failure(self, error: OSError) -> Exception:
        return storage_error(
            f"cannot write {self._folder}: {error.strerror}; free space, or choose another --out", error
        )


def _name(part: int) -> str:
    return f"part-{part:06d}.json"
