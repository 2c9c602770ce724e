"""Detections as compact arrays: collected per batch, gathered to rank 0, checked, sorted, written as COCO results JSON.

The order within an image is part of the result, because pycocotools breaks ties of scores by it. So every detection
carries its position, and sorting gives the same list at every world size. Raises DetectionError if detections cannot be
scored, and AnnotationError if a file is not a results file.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch.distributed
from numpy.typing import NDArray

from pipeline.errors import AnnotationError, DetectionError
from pipeline.files.atomic import write_file
from pipeline.runtime import Runtime

T = TypeVar("T")
TABLE_IDS = 2**22  # ids below are found by a table
LARGEST_PIXELS = 1e12  # the bound also refuses NaN and integers that no float can represent


@dataclass(frozen=True)
class Detections:
    """K detections of any number of images, 28 bytes each.

    Boxes and scores are float32 from a model and float64 from a results file. Scoring uses exactly these numbers, as
    Python floats.
    """

    image_ids: NDArray[np.int64]  # [K]
    orders: NDArray[np.int32]  # [K] position within the image's list, best first
    category_ids: NDArray[np.int64]  # [K] ids of the annotation file, not labels
    boxes_xywh: NDArray[np.floating]  # [K, 4] absolute pixels of the original image
    scores: NDArray[np.floating]  # [K]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, rows: NDArray[Any]) -> "Detections":
        """The rows that an index array or a boolean mask selects."""
        return Detections(
            self.image_ids[rows], self.orders[rows], self.category_ids[rows], self.boxes_xywh[rows], self.scores[rows]
        )

    def check_and_sort(self, images: Collection[int], categories: Collection[int]) -> "Detections":
        """Check the detections; returns them sorted by (image id, order).

        Args:
            images: ids that were evaluated.
            categories: ids that exist.

        Raises:
            DetectionError: a value is not finite, an image or category is unknown, or a position occurs twice, which
                means that an image was evaluated twice.
        """
        faults = []
        finite = np.isfinite(self.boxes_xywh).all(1) & np.isfinite(self.scores)
        if not finite.all():
            ids = np.unique(self.image_ids[~finite])
            faults.append(f"{np.count_nonzero(~finite)} have a box or score that is not finite (images {_few(ids)})")
        for what, found, known in (
            ("images", self.image_ids, images),
            ("categories", self.category_ids, categories),
        ):
            foreign = np.unique(found[find_places(found, np.unique(np.fromiter(known, np.int64, len(known)))) < 0])
            if len(foreign):
                faults.append(f"{what} {_few(foreign)} are not in the annotations")
        steps, turns = np.diff(self.image_ids), np.diff(self.orders)
        is_sorted = ((steps > 0) | ((steps == 0) & (turns >= 0))).all()
        ordered = self if is_sorted else self[np.lexsort((self.orders, self.image_ids))]
        twice = (np.diff(ordered.image_ids) == 0) & (np.diff(ordered.orders) == 0)
        if twice.any():
            faults.append(f"images {_few(np.unique(ordered.image_ids[1:][twice]))} were evaluated more than once")
        if faults:
            raise DetectionError(
                f"the {len(self)} detections cannot be scored: {'; '.join(faults)}. "
                "Check that detections and annotations belong together and that the model's weights are finite"
            )
        return ordered

    def to_results(self) -> list[dict[str, Any]]:
        """COCO's results: `[{"image_id", "category_id", "bbox": [x, y, w, h], "score"}]`, floats converted exactly."""
        columns = (self.image_ids, self.category_ids, self.boxes_xywh, self.scores)
        return [
            {"image_id": image, "category_id": category, "bbox": box, "score": score}
            for image, category, box, score in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def to_results_json(self, path: Path) -> str:
        """Write COCO results JSON by rename; returns the sha256 of its bytes."""
        body = json.dumps(self.to_results(), separators=(",", ":")).encode()
        write_file(path, body)
        return hashlib.sha256(body).hexdigest()


def concatenate(parts: Iterable[Detections]) -> Detections:
    """All rows of `parts` in their order; no part at all is an empty set."""
    found = list(parts) or [_empty()]
    return Detections(
        np.concatenate([part.image_ids for part in found]),
        np.concatenate([part.orders for part in found]),
        np.concatenate([part.category_ids for part in found]),
        np.concatenate([part.boxes_xywh for part in found]),
        np.concatenate([part.scores for part in found]),
    )


def _empty() -> Detections:
    ids, values = np.zeros(0, np.int64), np.zeros(0, np.float32)
    return Detections(ids, ids.astype(np.int32), ids, values.reshape(0, 4), values)


def gather(detections: Detections, runtime: Runtime) -> Detections | None:
    """The detections of all ranks, in rank order, on rank 0; None on the others. A collective."""
    parts = gather_objects(detections, runtime)
    return None if parts is None else concatenate(parts)


def gather_objects(item: T, runtime: Runtime) -> list[T] | None:
    """One item of each rank, in rank order, on rank 0; None on the others. A collective.

    Works over gloo and nccl; under nccl the bytes travel through the current CUDA device, which `runtime` has set.
    """
    if runtime.world == 1:
        return [item]
    items: list[Any] | None = [None] * runtime.world if runtime.is_main else None
    torch.distributed.gather_object(item, items, dst=0)
    return items


def find_places(ids: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each id in the ascending `known`, -1 if it is not there."""
    if len(known) == 0:
        return np.full(len(ids), -1)
    if known[0] >= 0 and known[-1] < TABLE_IDS:  # a table is ten times as fast as a search
        table = np.full(known[-1] + 2, -1)
        table[known] = np.arange(len(known))
        return np.asarray(table[np.minimum(np.maximum(ids, -1), known[-1] + 1)])
    places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[places] == ids, places, -1)


def _few(ids: NDArray[np.int64]) -> str:
    return ", ".join(map(str, ids[:5].tolist())) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def from_results_json(path: Path, names: Mapping[int, str] | None = None) -> Detections:
    """Read COCO results JSON; numbers keep their full precision, the order in an image is the order in the file.

    Args:
        path: the file.
        names: file name of each image in the annotations, by id. Where the results have names too, they must agree.

    Raises:
        AnnotationError: not JSON, not a list, or an entry without finite `bbox` and `score` or integer ids.
        DetectionError: an id stands for another file than in the annotations.
    """
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise AnnotationError(f"cannot read results {path}: {error.strerror}") from None
    except ValueError as error:
        raise AnnotationError(f"results {path} are not JSON: {error}") from None
    if not isinstance(entries, list):
        raise AnnotationError(
            f"results {path} hold a {type(entries).__name__}; COCO results are a list of "
            '{"image_id", "category_id", "bbox": [x, y, w, h], "score"}'
        )
    faults = [(place, fault) for place, entry in enumerate(entries) if (fault := _fault(entry))]
    if faults:
        shown = "; ".join(f"entry {place}: {fault}" for place, fault in faults[:5])
        raise AnnotationError(f"results {path} have {len(faults)} faulty entries of {len(entries)}: {shown}")
    _check_names(path, entries, names or {})
    seen: dict[int, int] = {}
    orders = np.zeros(len(entries), np.int32)
    for place, entry in enumerate(entries):
        orders[place] = seen.get(entry["image_id"], 0)
        seen[entry["image_id"]] = int(orders[place]) + 1
    return Detections(
        np.array([entry["image_id"] for entry in entries], np.int64),
        orders,
        np.array([entry["category_id"] for entry in entries], np.int64),
        np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4),
        np.array([entry["score"] for entry in entries], np.float64),
    )


def _fault(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"is a {type(entry).__name__}, not a detection"
    missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in entry]
    if missing:
        return f"has no {', '.join(missing)}"
    for key in ("image_id", "category_id"):
        if type(entry[key]) is not int or not 0 <= entry[key] < 2**63:
            return f"{key} {entry[key]!r} is not a whole number"
    box = entry["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
        return f"bbox {box!r} is not four finite numbers"
    return "" if _is_finite(entry["score"]) else f"score {entry['score']!r} is not a finite number"


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST_PIXELS


def _check_names(path: Path, entries: list[dict[str, Any]], names: Mapping[int, str]) -> None:
    """Refuse results whose ids are not those of the annotations, such as the 1, 2, 3 of a prediction on a folder."""
    given = {(entry["image_id"], entry["file_name"]) for entry in entries if isinstance(entry.get("file_name"), str)}
    for image, name in sorted(given):
        stem, known = _stem(name), names.get(image)
        if known is not None and stem != _stem(known) and not (stem.isdecimal() and int(stem) == image):
            raise DetectionError(
                f"{path} has other ids than the annotations: image {image} is {name} here and {known} there. Predict "
                "on shards of these annotations, which keep their ids; if files were only renamed, remove file_name"
            )


def _stem(name: str) -> str:
    """A file's name without folders and suffix, in lower case."""
    path = name.partition("?")[0] if "://" in name else name
    return PurePosixPath(path.replace("\\", "/")).stem.casefold()
