"""One drawn ground truth, written in the layouts of labelling tools; and what a shard folder holds, to compare them."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("cell", "dot", "ring")  # in alphabetical order, as layouts without numbers sort them
ROBOFLOW_SPLIT = {"train": "train", "val": "valid", "test": "test"}
SPLITS = {"train": 6, "val": 2, "test": 2}

Corners = tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """One image, its file name and its objects: class, and edges in pixels from 0."""

    name: str
    data: bytes
    width: int
    height: int
    boxes: tuple[tuple[str, Corners], ...]


Truth = Mapping[str, Sequence[Scene]]


def draw_scene(name: str, seed: int, kind: str = "JPEG", boxes: int = 3) -> Scene:
    """An image with objects drawn where its boxes say; the second box touches two edges."""
    rng = np.random.default_rng(seed)
    width, height = int(rng.integers(60, 90)), int(rng.integers(50, 70))
    ground = rng.integers(0, 255, (6, 6, 3), np.uint8)  # different for each seed, so that no two are near duplicates
    image = Image.fromarray(ground).resize((width, height), Image.Resampling.BICUBIC)
    pen, found = ImageDraw.Draw(image), []
    for number in range(boxes):
        left, top = (0, 0) if number == 1 else (int(value) for value in rng.integers(1, 30, 2))
        right, bottom = left + int(rng.integers(8, 20)), top + int(rng.integers(8, 18))
        label = CLASSES[int(rng.integers(len(CLASSES)))]
        pen.rectangle([left, top, right - 1, bottom - 1], outline="white", fill=(30, 40 * number, 200))
        found.append((label, (left, top, right, bottom)))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return Scene(name, buffer.getvalue(), width, height, tuple(found))


def draw_truth(splits: Mapping[str, int] = SPLITS, seed: int = 0) -> dict[str, list[Scene]]:
    """Scenes of each split; the last of each has no boxes."""
    truth, number = {}, 100 * seed
    for split, count in splits.items():
        truth[split] = []
        for place in range(count):
            number += 1
            kind = "PNG" if number % 3 == 0 else "JPEG"
            name = f"pic {number:03d}.{'png' if kind == 'PNG' else 'jpg'}"  # a space, as users have
            truth[split].append(draw_scene(name, number, kind, 0 if count > 1 and place == count - 1 else 3))
    return truth


def write_roboflow_coco(truth: Truth, root: Path) -> None:
    """`_annotations.coco.json` beside the images; a super-category 0 that no box has; ids from 0 in each split."""
    for split, scenes in truth.items():
        folder = root / ROBOFLOW_SPLIT[split]
        _write_images(scenes, folder)
        categories = [{"id": 0, "name": "things", "supercategory": "none"}, *_categories("things")]
        _write_coco(folder / "_annotations.coco.json", scenes, categories, first=0)
    (root / "README.dataset.txt").write_text("exported\n")


def write_coco_folders(truth: Truth, root: Path) -> None:
    """`annotations/instances_val2017.json` and `val2017/`, beside other annotations of the same images."""
    for split, scenes in truth.items():
        _write_images(scenes, root / f"{split}2017")
        _write_coco(root / "annotations" / f"instances_{split}2017.json", scenes, _categories())
        captions = {"images": [], "annotations": []}
        (root / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(captions))


def write_cvat_coco(truth: Truth, root: Path) -> None:
    """`annotations/instances_SUBSET.json`, `images/SUBSET/`, attributes."""
    for split, scenes in truth.items():
        _write_images(scenes, root / "images" / split)
        more = {"attributes": {"occluded": False}}
        _write_coco(root / "annotations" / f"instances_{split}.json", scenes, _categories(), more=more)


def write_label_studio_coco(truth: Truth, root: Path) -> None:
    """`result.json` and `images/` without splits: ids from 0, paths of Windows, sizes that are null."""
    scenes = [scene for split in truth.values() for scene in split]
    _write_images(scenes, root / "images")
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES)]
    _write_coco(root / "result.json", scenes, categories, first=0, prefix="images\\", sizes=False)


def write_ultralytics(truth: Truth, root: Path) -> None:
    """`data.yaml` with a path of another machine, `images/train`, `labels/train`; the last box as a polygon."""
    for split, scenes in truth.items():
        _write_images(scenes, root / "images" / split)
        _write_yolo(scenes, root / "labels" / split, polygon=True)
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(CLASSES))
    places = "".join(f"{split}: images/{split}\n" for split in truth)
    (root / "data.yaml").write_text(f"path: /home/me/datasets/things\n{places}names:\n{names}")


def write_roboflow_yolo(truth: Truth, root: Path) -> None:
    """`data.yaml` with `../train/images`, though `train` is beside it."""
    for split, scenes in truth.items():
        folder = root / ROBOFLOW_SPLIT[split]
        _write_images(scenes, folder / "images")
        _write_yolo(scenes, folder / "labels")
    places = "".join(f"{split}: ../{ROBOFLOW_SPLIT[split]}/images\n" for split in truth)
    (root / "data.yaml").write_text(f"{places}\nnc: {len(CLASSES)}\nnames: {list(CLASSES)}\n")


def write_darknet(truth: Truth, root: Path) -> None:
    """CVAT's YOLO 1.1: `obj.names`, `obj.data`, `train.txt` with a path per line, labels beside the images."""
    for split, scenes in truth.items():
        folder = root / f"obj_{split}_data"
        _write_images(scenes, folder)
        _write_yolo(scenes, folder)
        lines = "".join(f"data/obj_{split}_data/{scene.name}\n" for scene in scenes)
        (root / f"{split}.txt").write_text(lines)
    (root / "obj.names").write_text("\n".join(CLASSES))
    (root / "obj.data").write_text("classes = 3\ntrain = data/train.txt\nnames = data/obj.names\n")


def write_voc_kit(truth: Truth, root: Path) -> None:
    """The development kit: pixels from 1, both corners in the box, lists of names."""
    for split, scenes in truth.items():
        _write_images(scenes, root / "JPEGImages")
        _write_voc(scenes, root / "Annotations", first=1)
        sets = root / "ImageSets" / "Main"
        sets.mkdir(parents=True, exist_ok=True)
        (sets / f"{split}.txt").write_text("".join(f"{scene.name.rpartition('.')[0]}\n" for scene in scenes))
        (sets / f"cell_{split}.txt").write_text("".join(f"{scene.name.rpartition('.')[0]} -1\n" for scene in scenes))


def write_roboflow_voc(truth: Truth, root: Path) -> None:
    """XML beside the images, edges from 0."""
    for split, scenes in truth.items():
        folder = root / ROBOFLOW_SPLIT[split]
        _write_images(scenes, folder)
        _write_voc(scenes, folder, first=0)


def write_labelme(truth: Truth, root: Path) -> None:
    """JSON beside the images: rectangles from any corner, polygons, paths with backslashes, a point without a box."""
    for split, scenes in truth.items():
        folder = root / split
        _write_images(scenes, folder)
        for scene in scenes:
            shapes: list[dict[str, Any]] = []
            for number, (label, (left, top, right, bottom)) in enumerate(scene.boxes):
                points = [[right, top], [left, bottom]]
                kind = "rectangle"
                if number == 2:
                    points, kind = [[right, top], [left, top], [left, bottom], [right, bottom]], "polygon"
                shapes.append({"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}})
            if shapes:
                shapes.append({"label": "cell", "points": [[3, 4]], "shape_type": "point"})
            document = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"..\\photos\\{scene.name}"}
            document |= {"imageData": None, "imageHeight": scene.height, "imageWidth": scene.width}
            (folder / f"{scene.name.rpartition('.')[0]}.json").write_text(json.dumps(document))


WITH_SPLITS: dict[str, Callable[[Truth, Path], None]] = {
    "roboflow_coco": write_roboflow_coco,
    "coco_folders": write_coco_folders,
    "cvat_coco": write_cvat_coco,
    "ultralytics": write_ultralytics,
    "roboflow_yolo": write_roboflow_yolo,
    "darknet": write_darknet,
    "voc_kit": write_voc_kit,
    "roboflow_voc": write_roboflow_voc,
    "labelme": write_labelme,
}
WITHOUT_SPLITS = {"label_studio_coco": write_label_studio_coco}
LAYOUTS = WITH_SPLITS | WITHOUT_SPLITS


def pack_tree(folder: Path, archive: Path, below: str = "") -> Path:
    """A zip or tar (by suffix) of all that is below a folder, under `below`, in another order than their names."""
    paths = sorted(folder.rglob("*"), key=lambda path: path.name[::-1])  # with folders, as tools pack them
    members = [(path, below + str(path.relative_to(folder)).replace(os.sep, "/")) for path in paths]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for path, name in members:
                packed.write(path, name)
    else:
        with tarfile.open(archive, "w") as tar:
            for path, name in members:
                tar.add(path, name, recursive=False)
    return archive


def stored(folder: Path) -> dict[bytes, list[tuple[str, list[float]]]]:
    """By the bytes of each image of a shard folder: class and bbox (xywh) of its annotations."""
    names = {entry["id"]: entry["name"] for entry in json.loads((folder / "index.json").read_text())["categories"]}
    images, records = {}, {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                key, _, kind = member.name.partition(".")
                (records if kind == "json" else images)[key] = file.read()
    found = {}
    for key, data in images.items():
        annotations = json.loads(records[key])["annotations"]
        found[data] = sorted((names[entry["category_id"]], entry["bbox"]) for entry in annotations)
    return found


def expected(scenes: Sequence[Scene]) -> dict[bytes, list[tuple[str, list[float]]]]:
    """What `stored` should return."""
    return {
        scene.data: sorted((name, [x0, y0, x1 - x0, y1 - y0]) for name, (x0, y0, x1, y1) in scene.boxes)
        for scene in scenes
    }


def _write_images(scenes: Sequence[Scene], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        (folder / scene.name).write_bytes(scene.data)


def _categories(above: str = "none") -> list[dict[str, Any]]:
    return [{"id": number, "name": name, "supercategory": above} for number, name in enumerate(CLASSES, start=1)]


def _write_coco(
    path: Path,
    scenes: Sequence[Scene],
    categories: list[dict[str, Any]],
    first: int = 1,
    prefix: str = "",
    more: dict[str, Any] | None = None,
    sizes: bool = True,
) -> None:
    ids = {entry["name"]: entry["id"] for entry in categories}
    images, annotations = [], []
    for image, scene in enumerate(scenes, start=first):
        size = {"width": scene.width, "height": scene.height} if sizes else {"width": None, "height": None}
        images.append({"id": image, "file_name": prefix + scene.name, **size})
        for label, (left, top, right, bottom) in scene.boxes:
            box = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
            key = {"id": first + len(annotations), "image_id": image, "category_id": ids[label]}
            annotations.append(key | box | {"iscrowd": 0, "segmentation": []} | (more or {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"categories": categories, "images": images, "annotations": annotations}))


def _write_yolo(scenes: Sequence[Scene], folder: Path, polygon: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        lines = []
        for number, (label, (left, top, right, bottom)) in enumerate(scene.boxes):
            w, h = scene.width, scene.height
            if polygon and number == 2:
                numbers = [left / w, top / h, right / w, top / h, right / w, bottom / h, left / w, bottom / h]
            else:
                numbers = [(left + right) / 2 / w, (top + bottom) / 2 / h, (right - left) / w, (bottom - top) / h]
            lines.append(f"{CLASSES.index(label)} {' '.join(f'{value:.6f}' for value in numbers)}\n")
        if lines:  # an image of the background has no file
            (folder / f"{scene.name.rpartition('.')[0]}.txt").write_text("".join(lines))


def _write_voc(scenes: Sequence[Scene], folder: Path, first: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        objects = "".join(
            f"<object><name>{label}</name><difficult>0</difficult><bndbox><ymin>{top + first}</ymin>"
            f"<xmin>{left + first}</xmin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
            for label, (left, top, right, bottom) in scene.boxes
        )
        size = f"<size><width>{scene.width}</width><height>{scene.height}</height><depth>3</depth></size>"
        text = f"<annotation><folder/><filename>{scene.name}</filename>{size}{objects}</annotation>"
        (folder / f"{scene.name.rpartition('.')[0]}.xml").write_text(text)
