"""Draws an export like those of Roboflow: cells under a microscope that touch each other, in COCO JSON.

Three classes differ in shape: red cells with a pale centre, large white cells with a dark nucleus, small platelets. As
in real exports the splits lie in `train`, `valid` and `test` beside their annotation files, and the categories begin
with one that has no box. Everything is a function of (seed, number of the image).
"""

import json
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.files.atomic import replace_file
from pipeline.files.outputs import check_output

SPLITS = {"train": 160, "valid": 30, "test": 20}
CLASSES = ("cells", "platelet", "red cell", "white cell")  # the first is Roboflow's name of the project
RADII = {"platelet": (7.0, 11.0), "red cell": (17.0, 25.0), "white cell": (30.0, 38.0)}
SHARES = {"platelet": 0.2, "red cell": 0.7, "white cell": 0.1}
OBJECTS = (20, 36)
ANNOTATIONS = "_annotations.coco.json"

Canvas = NDArray[np.float32]  # [H, W, 3], 0..255
Rng = np.random.Generator


def write_export(path: Path, splits: Mapping[str, int] = SPLITS, size: int = 416, seed: int = 0) -> Path:
    """Draw an export as a zip.

    Args:
        path: of the zip; an existing file is replaced.
        splits: Roboflow's name of each split -> number of images.
        size: side of the images in pixels; the objects have the same size in pixels for any side.
        seed: another seed is another data set.

    Returns:
        `path`.

    Raises:
        InputError: `path` cannot be written.
    """
    check_output(path, [])
    number = 0
    with replace_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for split, count in splits.items():
            tree: dict[str, Any] = {
                "info": {"description": "drawn cells, made like an export of Roboflow"},
                "categories": [
                    {"id": key, "name": name, "supercategory": "none" if key == 0 else CLASSES[0]}
                    for key, name in enumerate(CLASSES)
                ],
                "images": [],
                "annotations": [],
            }
            for image_id in range(count):
                image, boxes = draw_cells(size, seed, number)
                name = f"cells_{number:04d}_jpg.rf.{seed:08x}.jpg"
                number += 1
                tree["images"].append({"id": image_id, "file_name": name, "width": size, "height": size})
                for label, (x, y, w, h) in boxes:
                    entry = {"id": len(tree["annotations"]), "image_id": image_id, "category_id": CLASSES.index(label)}
                    tree["annotations"].append(entry | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
                buffer = BytesIO()
                image.save(buffer, "JPEG", quality=90)
                _add(archive, f"{split}/{name}", buffer.getvalue())
            _add(archive, f"{split}/{ANNOTATIONS}", json.dumps(tree).encode())
    return path


def draw_cells(size: int, seed: int, number: int) -> tuple[Image.Image, list[tuple[str, tuple[float, ...]]]]:
    """One image, and the class and box (x, y, width, height) of each cell; most cells touch another one."""
    rng = np.random.default_rng([seed, number])
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    ground = rng.uniform((205, 190, 175), (235, 220, 210)).astype(np.float32)
    slope = (np.cos(angle := rng.uniform(0, 2 * np.pi)) * x + np.sin(angle) * y) / size
    canvas: Canvas = np.asarray(ground + 18 * slope[..., None], np.float32)
    cells: list[tuple[float, float, float]] = []  # centre and radius
    found = []
    labels = rng.choice(list(SHARES), int(rng.integers(*OBJECTS, endpoint=True)), p=list(SHARES.values()))
    for label in sorted(labels, key=lambda each: -RADII[each][1]):
        radius = float(rng.uniform(*RADII[label]))
        place = _touching_place(rng, cells, radius, size)
        if place is None:
            continue
        cells.append((*place, radius))
        stretch, tilt = rng.uniform(0.86, 1.0), rng.uniform(0, np.pi)
        _paint(canvas, rng, label, place, (radius, radius * stretch), tilt)
        half_w = np.hypot(radius * np.cos(tilt), radius * stretch * np.sin(tilt))
        half_h = np.hypot(radius * np.sin(tilt), radius * stretch * np.cos(tilt))
        left, top = max(0.0, place[0] - half_w), max(0.0, place[1] - half_h)
        right, bottom = min(float(size), place[0] + half_w), min(float(size), place[1] + half_h)
        found.append((str(label), tuple(round(float(v), 2) for v in (left, top, right - left, bottom - top))))
    canvas += rng.normal(0, 3.5, (size, size, 1)).astype(np.float32)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)), found


def _touching_place(
    rng: Rng, cells: list[tuple[float, float, float]], radius: float, size: int
) -> tuple[float, float] | None:
    """A centre inside the image, mostly at the edge of another cell, that covers none of them; None without one."""
    if 2 * radius > size:
        return None
    for attempt in range(60):
        if cells and attempt % 4:
            cx, cy, other = cells[int(rng.integers(len(cells)))]
            angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.9, 1.0) * (radius + other)
            x, y = cx + reach * np.cos(angle), cy + reach * np.sin(angle)
        else:
            x, y = rng.uniform(radius, size - radius, 2)
        inside = radius <= x <= size - radius and radius <= y <= size - radius
        if inside and all(np.hypot(x - cx, y - cy) >= 0.88 * (radius + other) for cx, cy, other in cells):
            return float(x), float(y)
    return None


def _paint(
    canvas: Canvas, rng: Rng, label: str, centre: tuple[float, float], radii: tuple[float, float], tilt: float
) -> None:
    """An ellipse with a soft rim; inside, what its class has."""
    reach = int(max(radii)) + 3
    x0, y0 = int(centre[0]) - reach, int(centre[1]) - reach
    rows = slice(max(0, y0), y0 + 2 * reach + 1)
    columns = slice(max(0, x0), x0 + 2 * reach + 1)
    patch = canvas[rows, columns]
    y, x = np.mgrid[rows.start : rows.start + patch.shape[0], columns.start : columns.start + patch.shape[1]]
    dx, dy = x - centre[0], y - centre[1]
    u = (np.cos(tilt) * dx + np.sin(tilt) * dy) / radii[0]
    v = (np.cos(tilt) * dy - np.sin(tilt) * dx) / radii[1]
    distance = np.hypot(u, v)  # 1 at the rim
    cover = np.clip((1 - distance) * min(radii) + 0.5, 0, 1)[..., None]
    shade = rng.uniform(-14, 14)
    if label == "red cell":
        colour = np.array([196, 120, 118]) + shade + 42 * np.exp(-((distance / 0.45) ** 2))[..., None]
    elif label == "white cell":
        lobes = np.hypot(u - 0.2, v) < 0.45, np.hypot(u + 0.25, v - 0.2) < 0.4
        nucleus = (lobes[0] | lobes[1])[..., None]
        colour = np.where(nucleus, np.array([96, 66, 140]), np.array([190, 178, 205])) + shade
    else:
        colour = np.array([128, 88, 150]) + shade + rng.normal(0, 9, (*distance.shape, 1))
    rim = 26 * np.exp(-(((distance - 0.95) / 0.1) ** 2))[..., None]
    patch += (cover * (colour - rim - patch)).astype(np.float32)


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add a file without the time, so that the same seed gives the same bytes."""
    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
