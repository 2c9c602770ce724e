"""The results of a prediction as one file: COCO results JSON or Parquet, and beside it the list of its images.

Rows are written one part after the other, so that memory does not grow with the number of images. A file that cannot
be written is a StorageError.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.index import Category
from pipeline.errors import storage_error
from pipeline.files.atomic import replace_file
from pipeline.inference.prediction_parts import Row

SUFFIXES = (".json", ".parquet")
ROW_GROUP = 100_000  # detections of a Parquet file that are held in memory
Detection = dict[str, Any]


def images_file(out: Path) -> Path:
    """The list of the images beside a results file: `detections.images.json`."""
    return out.with_name(f"{out.stem}.images.json")


def write_results(
    out: Path, rows: Iterable[tuple[int, Row]], names: Sequence[str], ids: Sequence[int], categories: Sequence[Category]
) -> None:
    """Write a results file and its list of images.

    A detection has `image_id`, `category_id`, `bbox` ([x, y, width, height] in pixels), `score`, `file_name` and
    `label`; in Parquet the box is the columns `x`, `y`, `width` and `height`. The list has `images` and `categories` as
    a COCO annotation file has them, also of images without detections, and `unreadable` ones with their `reason`.

    Args:
        out: ends with one of SUFFIXES.
        rows: each image's number and result, in order.
        names: of the images, by number.
        ids: their `image_id`.
        categories: of the model.

    Raises:
        StorageError: it cannot be written.
    """
    images: list[dict[str, Any]] = []
    unreadable: list[dict[str, Any]] = []

    def detections() -> Iterator[Detection]:
        for number, row in rows:
            image = {"id": ids[number], "file_name": names[number]}
            if "fault" in row:
                unreadable.append(image | {"reason": row["fault"]})
                continue
            images.append(image | {"width": row["size"][1], "height": row["size"][0]})
            for category, box, score, label in zip(
                row["category_ids"], row["boxes"], row["scores"], row["labels"], strict=True
            ):
                yield {"image_id": ids[number], "category_id": category, "bbox": box, "score": score} | {
                    "file_name": names[number],
                    "label": label,
                }

    try:
        with replace_file(out) as temporary, replace_file(images_file(out)) as listed:
            (_write_json if out.suffix.lower() == ".json" else _write_parquet)(temporary, detections())
            named = [{"id": category.id, "name": category.name} for category in categories]
            document = {"images": images, "annotations": [], "categories": named, "unreadable": unreadable}
            listed.write_text(json.dumps(document) + "\n", encoding="utf-8")
    except OSError as error:
        raise storage_error(f"cannot write {out}: {error.strerror}; choose another --out", error) from None


def _write_json(path: Path, detections: Iterator[Detection]) -> None:
    with path.open("w", encoding="utf-8") as file:
        before = "["
        for detection in detections:
            file.write(f"{before}\n{json.dumps(detection, separators=(',', ':'))}")
            before = ","
        file.write("\n]\n" if before == "," else "[]\n")


def _write_parquet(path: Path, detections: Iterator[Detection]) -> None:
    import pyarrow  # only this format needs it
    from pyarrow.parquet import ParquetWriter

    numbers = [(name, pyarrow.float64()) for name in ("x", "y", "width", "height", "score")]
    head = [("image_id", pyarrow.int64()), ("file_name", pyarrow.string()), ("category_id", pyarrow.int64())]
    schema = pyarrow.schema([*head, ("label", pyarrow.string()), *numbers])
    with ParquetWriter(path, schema) as writer:
        held: list[Detection] = []
        for detection in detections:
            held.append(detection | dict(zip(("x", "y", "width", "height"), detection["bbox"], strict=True)))
            if len(held) == ROW_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(held, schema))
                held = []
        writer.write_table(pyarrow.Table.from_pylist(held, schema))
