"""Annotation files with one fault each: the rule that it breaks, and what the message names."""

from typing import Any

from pipeline.data.sharding.rules import Rule
from support.data import CATEGORIES


def _annotation(**change: Any) -> dict[str, Any]:
    return {"annotations": [{"id": 7, "image_id": 3, "category_id": 1, "bbox": [0, 0, 2, 2]} | change]}


def _image(**change: Any) -> dict[str, Any]:
    return {"images": [{"id": 3, "file_name": "x.jpg", "width": 9, "height": 9} | change]}


REFUSED: list[tuple[dict[str, Any], Rule, str]] = [
    (_annotation(category_id=2), Rule.UNKNOWN_CATEGORY, "(1): annotation 7 of image 3 (category_id 2);"),
    (_annotation(category_id="1"), Rule.UNKNOWN_CATEGORY, "(1): annotation 7 of image 3 (category_id '1')"),
    (_annotation(image_id=4), Rule.UNKNOWN_IMAGE, "(1): annotation 7 of image 4"),
    (_annotation(image_id=None), Rule.UNKNOWN_IMAGE, "image_id None"),
    (_annotation(bbox=[1, 2, 3]), Rule.BAD_BOX, "bbox [1, 2, 3]"),
    (_annotation(bbox=[1, 2, float("nan"), 4]), Rule.BAD_BOX, "bbox [1, 2, nan, 4]"),
    (_annotation(bbox=[1, 2, 10**400, 4]), Rule.BAD_BOX, "bbox"),
    (_annotation(bbox=[1, 2, 3e30, 4]), Rule.BAD_BOX, "bbox [1, 2, 3e+30, 4]"),
    (_annotation(bbox=[1, 2, True, 4]), Rule.BAD_BOX, "bbox [1, 2, True, 4]"),
    (_annotation(bbox=["1 px", 2, 3, 4]), Rule.BAD_BOX, "bbox ['1 px', 2, 3, 4]"),
    (_annotation(bbox=["nan", 2, 3, 4]), Rule.BAD_BOX, "bbox"),
    (_annotation(bbox=["1e400", 2, 3, 4]), Rule.BAD_BOX, "bbox"),
    (_annotation(bbox="1, 2, 3, 4"), Rule.BAD_BOX, "bbox"),
    (_annotation(bbox=None), Rule.BAD_BOX, "bbox None"),
    (_annotation(area="big"), Rule.BAD_AREA, "area 'big'"),
    (_annotation(area=float("inf")), Rule.BAD_AREA, "area inf"),
    (_annotation(iscrowd=2), Rule.BAD_CROWD, "iscrowd 2"),
    (_annotation(iscrowd="no"), Rule.BAD_CROWD, "iscrowd 'no'"),
    (_annotation(iscrowd=1, segmentation={"counts": [float("nan")], "size": [9, 9]}), Rule.BAD_MASK, "annotation 7"),
    (_annotation(id="x"), Rule.BAD_ID, "annotation id 'x'"),
    (_annotation(id=2**63), Rule.BAD_ID, f"annotation id {2**63}"),
    ({"annotations": [{"id": 7, "image_id": 3}]}, Rule.MALFORMED, "category_id, bbox"),
    ({"annotations": [None]}, Rule.MALFORMED, "id, image_id, category_id, bbox"),
    ({"annotations": _annotation()["annotations"] * 3}, Rule.REPEATED_ANNOTATION, "(2): 7, 7"),
    ({"categories": [*CATEGORIES, CATEGORIES[0]]}, Rule.REPEATED_CATEGORY, "(1): 90"),
    ({"categories": [{"id": 1}]}, Rule.MALFORMED, "name"),
    ({"categories": [{"id": 1, "name": "\ud800"}]}, Rule.MALFORMED, "category 1"),
    ({"categories": [{"id": -1, "name": "x"}]}, Rule.BAD_ID, "category id -1"),
    ({"images": [{"id": 1}]}, Rule.MALFORMED, "file_name, width, height"),
    (_image(id=10**12), Rule.BAD_ID, "image id 1000000000000"),
    ({"images": _image()["images"] * 2}, Rule.REPEATED_IMAGE, "(1): 3"),
    *((_image(file_name=name), Rule.BAD_FILE_NAME, "image 3") for name in
      ("../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "", ".", "x\0.jpg", "\ud800.jpg", 3, None)),
    *((_image(width=width), Rule.BAD_SIZE, "image 3") for width in (0, -1, 9.0, "9", None, True, 10**8)),
]  # fmt: skip
