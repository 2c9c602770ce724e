"""LabelMe JSON with its shapes and quirks."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.data import edit
from support.layouts import draw_truth, write_labelme

from pipeline.data.importing.dataset import Options, read_dataset
from pipeline.data.sharding.rules import Rule

TRUTH = draw_truth({"train": 2, "val": 1})
FIRST = "train/pic 001.json"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    write_labelme(TRUTH, tmp_path / "export")
    return tmp_path / "export"


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ({"shape_type": "rectangle", "points": [[30, 20], [10, 5]]}, [10, 5, 20, 15]),
        ({"shape_type": "rectangle", "points": [[10, 5], [30, 5], [30, 20], [10, 20]]}, [10, 5, 20, 15]),
        ({"shape_type": "polygon", "points": [[10, 20], [30, 12.5], [20, 5]]}, [10, 5, 20, 15]),
        ({"points": [[10, 20], [30, 12.5], [20, 5]]}, [10, 5, 20, 15]),
        ({"shape_type": "circle", "points": [[20, 20], [23, 24]]}, [15, 15, 10, 10]),
        ({"shape_type": "mask", "points": [[10, 5], [29, 19]], "mask": "iVBO"}, [10, 5, 20, 15]),
    ],
)
def test_shape_becomes_the_box_around_it(export: Path, shape: dict[str, Any], box: list[float]) -> None:
    edit(export / FIRST, {"shapes": [{"label": " dot ", **shape}]})
    found = read_dataset(str(export), Options())
    image, _ = found.splits[0].samples[0]
    names = {category.id: category.name for category in found.splits[0].source.categories}
    assert [(names[one["category_id"]], one["bbox"]) for one in image.annotations] == [("dot", box)]


@pytest.mark.parametrize("kind", ["point", "line", "linestrip", "points"])
def test_shape_without_area_is_left_out_with_a_finding(export: Path, kind: str) -> None:
    edit(export / FIRST, {"shapes": [{"label": "dot", "shape_type": kind, "points": [[1, 2], [3, 4]]}]})
    found = read_dataset(str(export), Options())
    assert found.splits[0].samples[0][0].annotations == []
    (examples,) = (examples for rule, _, examples in found.findings if rule is Rule.SHAPE_WITHOUT_AREA)
    assert f"{FIRST} shape 1 ({kind!r})" in examples


def test_file_with_its_image_before_the_shapes_is_recognised(export: Path) -> None:
    for path in export.rglob("*.json"):
        document = json.loads(path.read_text()) | {"imageData": "A" * 200_000}
        path.write_text(json.dumps(document, sort_keys=True))
    assert len(read_dataset(str(export), Options()).splits) == 2


def test_image_without_a_file_is_left_out_with_a_finding(export: Path) -> None:
    (export / "train/more.png").write_bytes(TRUTH["train"][0].data)
    found = read_dataset(str(export), Options())
    assert [len(split.samples) for split in found.splits] == [2, 1]
    assert found.findings.count(Rule.UNLISTED_FILE) == 1
