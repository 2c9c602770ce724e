"""Results files: JSON and Parquet hold the same detections, and the list beside them every image."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from pycocotools.coco import COCO

from pipeline.data.index import Category
from pipeline.errors import StorageError
from pipeline.inference import prediction_output
from pipeline.inference.prediction_output import images_file, write_results
from pipeline.inference.prediction_parts import Row

CATEGORIES = (Category(10, "disc"), Category(20, "square"))
NAMES, IDS = ["a.jpg", "b.jpg", "c.jpg"], [5, 7, 9]
ROWS: list[tuple[int, Row]] = [
    (
        0,
        {
            "size": [90, 120],
            "boxes": [[1.5, 2, 0.1, 4], [5, 6, 7, 8]],
            "scores": [0.9, 0.1],
            "labels": ["disc", "square"],
            "category_ids": [10, 20],
        },
    ),
    (1, {"size": [60, 80], "boxes": [], "scores": [], "labels": [], "category_ids": []}),
    (2, {"fault": "is neither JPEG nor PNG"}),
]


def test_write_results_json_is_read_by_pycocotools_with_its_list(tmp_path: Path) -> None:
    out = tmp_path / "new" / "found.json"
    write_results(out, ROWS, NAMES, IDS, CATEGORIES)
    rows = json.loads(out.read_text())
    assert [(row["image_id"], row["category_id"], row["bbox"], row["score"]) for row in rows] == [
        (5, 10, [1.5, 2, 0.1, 4], 0.9),
        (5, 20, [5, 6, 7, 8], 0.1),
    ]
    assert {row["file_name"] for row in rows} == {"a.jpg"}
    listed = json.loads(images_file(out).read_text())
    assert [(image["id"], image["width"], image["height"]) for image in listed["images"]] == [(5, 120, 90), (7, 80, 60)]
    assert listed["unreadable"] == [{"id": 9, "file_name": "c.jpg", "reason": "is neither JPEG nor PNG"}]
    assert len(COCO(str(images_file(out))).loadRes(str(out)).anns) == 2


@pytest.mark.parametrize("group", [1, 2, 100])
def test_write_results_parquet_has_the_detections_of_the_json(
    group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_output, "ROW_GROUP", group)
    for suffix in ("json", "parquet"):
        write_results(tmp_path / f"found.{suffix}", ROWS, NAMES, IDS, CATEGORIES)
    table = pyarrow.parquet.read_table(tmp_path / "found.parquet").to_pylist()
    for row in table:
        row["bbox"] = [row.pop(name) for name in ("x", "y", "width", "height")]
    assert table == json.loads((tmp_path / "found.json").read_text())


def test_write_results_without_detections_is_an_empty_file_of_its_kind(tmp_path: Path) -> None:
    for suffix in ("json", "parquet"):
        write_results(tmp_path / f"found.{suffix}", ROWS[1:], NAMES, IDS, CATEGORIES)
    assert json.loads((tmp_path / "found.json").read_text()) == []
    assert pyarrow.parquet.read_table(tmp_path / "found.parquet").num_rows == 0


def test_write_results_failure_leaves_the_old_files(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    write_results(out, ROWS, NAMES, IDS, CATEGORIES)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail() -> object:
        yield ROWS[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"found\.json"):
        write_results(out, fail(), NAMES, IDS, CATEGORIES)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
