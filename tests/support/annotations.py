"""Annotation files with one fault each, and what is said of it."""

from typing import Any

from support.data import CATEGORIES


def _annotation(**change: Any) -> dict[str, Any]:
    return {"annotations": [{"id": 7, "image_id": 3, "category_id": 1, "bbox": [0, 0, 2, 2]} | change]}


def _image(**change: Any) -> dict[str, Any]:
    return {"images": [{"id": 3, "file_name": "x.jpg", "width": 9, "height": 9} | change]}


REFUSED = [
    (_annotation(category_id=2), r"of categories .* not listed \(1\): annotation 7 of image 3 \(category_id 2\);"),
    (_annotation(category_id="1"), r"not listed \(1\): annotation 7 of image 3 \(category_id '1'\)"),
    (_annotation(image_id=4), r"of images that are not listed \(1\): annotation 7 of image 4"),
    (_annotation(image_id=None), r"image_id None"),
    (_annotation(bbox=[1, 2, 3]), "not four finite numbers"),
    (_annotation(bbox=[1, 2, float("nan"), 4]), r"not four finite numbers .*bbox \[1, 2, nan, 4\]"),
    (_annotation(bbox=[1, 2, 10**400, 4]), "not four finite numbers"),
    (_annotation(bbox=[1, 2, 3e30, 4]), "not four finite numbers"),
    (_annotation(bbox=[1, 2, True, 4]), "not four finite numbers"),
    (_annotation(bbox=["1 px", 2, 3, 4]), r"not four finite numbers .*bbox \['1 px', 2, 3, 4\]"),
    (_annotation(bbox=["nan", 2, 3, 4]), "not four finite numbers"),
    (_annotation(bbox=["1e400", 2, 3, 4]), "not four finite numbers"),
    (_annotation(bbox="1, 2, 3, 4"), "not four finite numbers"),
    (_annotation(area="big"), "areas that are not finite numbers"),
    ({"categories": [{"id": 1, "name": "\ud800"}]}, "category 1 has a name that is not Unicode text"),
    (_annotation(bbox=None), "not four finite numbers"),
    (_annotation(area=float("inf")), r"areas that are not finite numbers .*area inf"),
    (_annotation(iscrowd=2), "neither 0 nor 1"),
    (_annotation(iscrowd="no"), "neither 0 nor 1"),
    (_annotation(iscrowd=1, segmentation={"counts": [float("nan")], "size": [9, 9]}), "crowd masks with values"),
    (_annotation(id="x"), r"ids that are not whole numbers .*annotation id 'x'"),
    (_annotation(id=2**63), "ids that are not whole numbers"),
    ({"annotations": [{"id": 7, "image_id": 3}]}, r"annotation number 1 has no category_id, bbox"),
    ({"annotations": [None]}, "annotation number 1 has no id, image_id, category_id, bbox"),
    ({"annotations": _annotation()["annotations"] * 3}, r"annotation ids given twice \(2\): 7, 7"),
    ({"categories": [*CATEGORIES, CATEGORIES[0]]}, r"category ids given twice \(1\): 90"),
    ({"categories": [{"id": 1}]}, "category number 1 has no name"),
    ({"categories": [{"id": -1, "name": "x"}]}, "category id -1"),
    ({"images": [{"id": 1}]}, "image number 1 has no file_name, width, height"),
    (_image(id=10**12), r"up to 12 digits\) .*image id 1000000000000"),
    ({"images": _image()["images"] * 2}, r"image ids given twice \(1\): 3"),
    *((_image(file_name=name), "leave the image folder") for name in
      ("../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "", ".", "x\0.jpg", "\ud800.jpg", 3, None)),
    *((_image(width=width), "width and height") for width in (0, -1, 9.0, "9", None, True, 10**8)),
]  # fmt: skip
