"""Draws a COCO-format data set of textured shapes, for the demo and for tests; needs no download.

A class is a shape: colour, texture, size, aspect and tilt are random, so only the outline shows the class. Between the
objects there is clutter without a closed outline (lines, soft blobs, patches of noise). As in COCO, most objects are
small, and category and image ids have gaps. Some JPEGs are grayscale, some images are empty, some hold a crowd region.
Everything is a pure function of (seed, number of the image); only the arguments can be wrong (InputError).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.errors import InputError
from pipeline.files.outputs import write_text

DESCRIPTION = "textured shapes"  # beginning of the annotations' `info.description`; tells drawn data from a user's
CATEGORIES = {1: "disc", 3: "square", 4: "triangle", 7: "ring", 10: "cross"}
SIDES = (12.5, 70.0)  # of an object's longer side, log-uniform: more than half of the objects count as small
ASPECTS = (0.8, 1.25)
TILT = 15.0  # degrees to either side
CROWD_SIDES = (6.0, 9.0)  # too small to annotate one by one
CONTRAST = 55.0  # minimum difference in luminance between an object and its background, so that grayscale shows it too
OVERSAMPLE = 4  # outlines are rasterised at this factor, then averaged

Canvas = NDArray[np.float32]  # [H, W, 3], 0..255
Points = NDArray[np.float64]  # [N, 2] as (x, y) in pixels
Box = tuple[float, float, float, float]  # x0, y0, x1, y1
Rng = np.random.Generator


def write_synthetic(out: Path, *, images: int, seed: int, size: int = 160) -> tuple[Path, Path]:
    """Draw `images` files into `out/images` and describe them in `out/annotations.json`.

    One of 20 images is empty, one of 10 is grayscale, one of 12 has a crowd region; the first 8 have one of each kind.
    The others hold 1-8 objects that hardly overlap. The JSON lists no images until all are drawn.

    Args:
        out: folder; created if it does not exist. Data that an earlier call drew there is overwritten.
        images: how many.
        seed: another seed is another data set; the same seed gives the same bytes.
        size: mean side in pixels; each side of each image is drawn from 0.8 to 1.2 times this.

    Returns:
        Path of the annotations and path of the image folder.

    Raises:
        InputError: `images` < 1 or `size` < 64, or `out` holds images or annotations that were not drawn here.
    """
    if images < 1 or size < 64:
        raise InputError(f"a synthetic data set needs images >= 1 and size >= 64, not {images} and {size}")
    folder, path = out / "images", out / "annotations.json"
    _refuse_foreign(folder, path)
    folder.mkdir(parents=True, exist_ok=True)
    tree: dict[str, Any] = {
        "info": {"description": f"{DESCRIPTION}, seed {seed}"},
        "images": [],
        "annotations": [],
        "categories": [{"id": key, "name": name, "supercategory": "shape"} for key, name in CATEGORIES.items()],
    }
    write_text(path, json.dumps(tree))
    for number in range(images):
        rng = np.random.default_rng([seed, number])
        image_id = 3 * number + 1 + int(rng.integers(3))
        height, width = (int(side) for side in rng.integers(round(0.8 * size), round(1.2 * size) + 1, 2))
        canvas = _backdrop(rng, height, width)
        found = [] if number % 20 == 7 else _populate(canvas, rng, crowd=number % 12 == 5)
        for annotation in found:
            tree["annotations"].append({"id": len(tree["annotations"]) + 1, "image_id": image_id, **annotation})
        image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
        name = f"{image_id:012d}.jpg"
        (image.convert("L") if number % 10 == 3 else image).save(folder / name, quality=90)
        tree["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
    write_text(path, json.dumps(tree))
    return path, folder


def _refuse_foreign(folder: Path, path: Path) -> None:
    """Raise InputError if images or annotations would be overwritten that `write_synthetic` did not draw."""
    try:
        own = json.loads(path.read_bytes())["info"]["description"].startswith(DESCRIPTION)
    except FileNotFoundError:
        own = not folder.exists() or not any(folder.iterdir())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        own = False
    if not own:
        raise InputError(f"{folder.parent} holds files that were not drawn here; move them, or choose another folder")


def _backdrop(rng: Rng, height: int, width: int) -> Canvas:
    """A gradient between two colours, slow stains, grain, and clutter."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5) + 0.5)[..., None]
    dark, light = rng.uniform(40, 215, (2, 3)).astype(np.float32)
    canvas = dark + (light - dark) * slope + _stains(rng, height, width, cells=5, amplitude=20)[..., None]
    for _ in range(int(rng.integers(1, 4))):
        _blob(canvas, rng)
    for _ in range(int(rng.integers(0, 3))):
        _noise(canvas, rng)
    canvas = _lines(canvas, rng)
    canvas += rng.normal(0, rng.uniform(2, 7), (height, width, 1)).astype(np.float32)
    return canvas


def _stains(rng: Rng, height: int, width: int, cells: int, amplitude: float) -> NDArray[np.float32]:
    coarse = rng.normal(0, amplitude, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _bump(canvas: Canvas, rng: Rng) -> NDArray[np.float32]:
    """A soft tilted hill of height 1 somewhere on the canvas: no edge, so no outline."""
    height, width = canvas.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x - rng.uniform(0, width), y - rng.uniform(0, height)
    angle, long, short = rng.uniform(0, np.pi), rng.uniform(8, 30), rng.uniform(6, 14)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    hill: NDArray[np.float32] = np.exp(-0.5 * ((u / long) ** 2 + (v / short) ** 2)).astype(np.float32)
    return hill


def _blob(canvas: Canvas, rng: Rng) -> None:
    canvas += _bump(canvas, rng)[..., None] * rng.uniform(-70, 70, 3).astype(np.float32)


def _noise(canvas: Canvas, rng: Rng) -> None:
    speckle = rng.normal(0, 45, (*canvas.shape[:2], 1)).astype(np.float32)
    canvas += _bump(canvas, rng)[..., None] * speckle


def _lines(canvas: Canvas, rng: Rng) -> Canvas:
    """Open strokes of 1-3 px that cross a good part of the image."""
    height, width = canvas.shape[:2]
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 6))):
        start, angle = rng.uniform((0, 0), (width, height)), rng.uniform(0, 2 * np.pi)
        end = start + rng.uniform(40, 120) * np.array([np.cos(angle), np.sin(angle)])
        colour = tuple(int(c) for c in rng.integers(20, 236, 3))
        pen.line([*start.tolist(), *end.tolist()], fill=colour, width=int(rng.integers(1, 4)))
    return np.asarray(image).astype(np.float32)


def _populate(canvas: Canvas, rng: Rng, crowd: bool) -> list[dict[str, Any]]:
    """Paint a crowd region if asked and 1-8 objects; returns their annotations without ids."""
    height, width = canvas.shape[:2]
    largest = min(SIDES[1], 0.5 * min(height, width))
    taken: list[Box] = []
    annotations: list[dict[str, Any]] = []
    if crowd:
        annotations.append(_paint_crowd(canvas, rng, taken))
    wanted = int(rng.integers(1, 9))
    for side in sorted(np.exp(rng.uniform(np.log(SIDES[0]), np.log(largest), wanted)), reverse=True):
        category = int(rng.choice(list(CATEGORIES)))
        box = _free_box(rng, taken, side, width, height)
        if box is None:
            continue
        taken.append(box)
        points = np.round(_outline(CATEGORIES[category], rng) * _extent(box) + np.array(box[:2]), 2)
        _paint(canvas, rng, points)
        bbox = np.concatenate([points.min(0), np.ptp(points, axis=0)])
        annotations.append(
            {
                "category_id": category,
                "bbox": np.round(bbox, 2).tolist(),
                "area": _area(points),
                "iscrowd": 0,
                "segmentation": [points.ravel().tolist()],
            }
        )
    return annotations


def _paint_crowd(canvas: Canvas, rng: Rng, taken: list[Box]) -> dict[str, Any]:
    """A cluster of tiny shapes of one class under one run-length mask, as COCO annotates crowds."""
    height, width = canvas.shape[:2]
    category = int(rng.choice(list(CATEGORIES)))
    extent = rng.uniform(28, 48, 2)
    x0, y0 = rng.uniform((0, 0), (width - extent[0], height - extent[1]))
    mask = np.zeros((height, width), bool)
    members: list[Box] = []
    for side in rng.uniform(*CROWD_SIDES, 16):
        box = _free_box(rng, members, side, extent[0], extent[1], overlap=0.0)
        if box is not None:
            members.append(box)
            points = _outline(CATEGORIES[category], rng) * _extent(box) + np.array(box[:2]) + (x0, y0)
            rows, columns, cover = _paint(canvas, rng, points)
            mask[rows, columns] |= cover > 0.5
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top, right, bottom = int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
    taken.append((left, top, right, bottom))
    return {
        "category_id": category,
        "bbox": [left, top, right - left, bottom - top],
        "area": int(mask.sum()),
        "iscrowd": 1,
        "segmentation": {"size": [height, width], "counts": _runs(mask)},
    }


def _runs(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed RLE: lengths of alternating runs in column-major order, zeros first."""
    flat = mask.ravel(order="F")
    turns = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs: list[int] = np.diff(np.concatenate([[0], turns, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def _free_box(
    rng: Rng, taken: list[Box], side: float, width: float, height: float, overlap: float = 0.08
) -> Box | None:
    """A box inside the image that covers at most `overlap` of itself or of any other; None if 20 tries found none."""
    aspect = rng.uniform(*ASPECTS)
    w, h = side * min(1.0, aspect), side * min(1.0, 1 / aspect)
    for _ in range(20):
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        box = (float(x), float(y), float(x + w), float(y + h))
        if all(_overlap(box, other) <= overlap for other in taken):
            return box
    return None


def _overlap(a: Box, b: Box) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min(float(np.prod(_extent(a))), float(np.prod(_extent(b))))
    return max(w, 0.0) * max(h, 0.0) / smaller


def _extent(box: Box) -> Points:
    return np.array([box[2] - box[0], box[3] - box[1]])


def _outline(shape: str, rng: Rng) -> Points:
    """The shape as one polygon, tilted and stretched to fill the unit square. A ring is cut open by a seam."""
    turn = np.linspace(0, 2 * np.pi, 33)
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)
    if shape == "disc":
        points = circle[:-1]
    elif shape == "ring":
        points = np.concatenate([circle, rng.uniform(0.45, 0.6) * circle[::-1]])
    elif shape == "square":
        points = np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    elif shape == "triangle":
        points = np.array([[0.0, -1], [1, 1], [-1, 1]])
    else:
        arm = rng.uniform(0.28, 0.4)
        quarter = np.array([[arm, -1.0], [arm, -arm], [1, -arm]])
        points = np.concatenate([_rotate(quarter, c, s) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))])
    angle = np.radians(rng.uniform(-TILT, TILT))
    points = _rotate(points, np.cos(angle), np.sin(angle))
    unit: NDArray[np.float64] = (points - points.min(0)) / np.ptp(points, axis=0)
    return unit


def _rotate(points: Points, cosine: float, sine: float) -> Points:
    """Without a matrix product, whose last bits differ between processors."""
    x, y = points.T
    return np.stack([x * cosine - y * sine, x * sine + y * cosine], 1)


def _area(points: Points) -> float:
    """Of a polygon whose coordinates have two decimals, from integers: exact, so the same on every processor."""
    x, y = np.rint(100 * points.T).astype(np.int64)
    return abs(int((x * np.roll(y, 1) - y * np.roll(x, 1)).sum())) / (2 * 100**2)


def _paint(canvas: Canvas, rng: Rng, points: Points) -> tuple[slice, slice, NDArray[np.float32]]:
    """Fill the outline with a fresh texture; returns the rows, columns and coverage (0..1) that it touched."""
    (x0, y0), (x1, y1) = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int)
    stencil = Image.new("L", (OVERSAMPLE * int(x1 - x0), OVERSAMPLE * int(y1 - y0)))
    ImageDraw.Draw(stencil).polygon(((points - (x0, y0)) * OVERSAMPLE - 0.5).ravel().tolist(), fill=255)
    cover = np.asarray(stencil.reduce(OVERSAMPLE), np.float32) / np.float32(255)
    rows, columns = slice(int(y0), int(y1)), slice(int(x0), int(x1))
    patch = canvas[rows, columns]
    cover = cover[: patch.shape[0], : patch.shape[1]]
    below = float(patch.mean(2)[cover > 0.5].mean()) if (cover > 0.5).any() else float(patch.mean())
    patch += cover[..., None] * (_texture(rng, cover.shape[0], cover.shape[1], below) - patch)
    return rows, columns, cover


def _texture(rng: Rng, height: int, width: int, below: float) -> Canvas:
    """A coloured pattern whose mean luminance differs from `below`."""
    room = np.array([max(below - CONTRAST - 20, 0), max(235 - below - CONTRAST, 0)])  # darker, lighter
    lighter = rng.uniform(0, room.sum()) >= room[0]
    luminance = rng.uniform(below + CONTRAST, 235) if lighter else rng.uniform(20, below - CONTRAST)
    tint = rng.uniform(-45, 45, 3)
    colour = luminance + tint - tint.mean()
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(3, 9)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    waves = (
        lambda: np.zeros_like(x),
        lambda: np.sign(np.sin(2 * np.pi * u / period)),
        lambda: np.sign(np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period)),
        lambda: rng.normal(0, 0.7, x.shape),
        lambda: 2 * (u - u.min()) / max(float(np.ptp(u)), 1.0) - 1,
    )
    pattern = waves[int(rng.integers(len(waves)))]() * rng.uniform(8, 22)
    painted: NDArray[np.float32] = (colour + pattern[..., None]).astype(np.float32)
    return painted
