"""Draws the boxes of images that EXIF rotates, so that a person can decide `--exif` (`jobs.lint --draw FOLDER`).

Each PNG shows the same boxes twice: left on the image as stored, right on the image as viewers show it. A folder
that is not empty is an AnnotationError, an image that cannot be read a ShardError.
"""

from collections.abc import Sequence
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pipeline.data.images import decode, turn_upright
from pipeline.data.sharding.annotations import CocoImage
from pipeline.data.sharding.converted import read_stored
from pipeline.data.sharding.image_files import ImageFile
from pipeline.data.sharding.lint import RotatedSample
from pipeline.errors import AnnotationError

MAX_IMAGES = 24
LONGEST_SIDE = 480  # pixels of each half
GAP, CAPTION, CAPTION_WIDTH = 8, 24, 160
INK, FRAME = (255, 40, 120), (255, 255, 255)
WAYS = ("stored: --exif ignore", "displayed: --exif apply")


def draw_both_ways(rotated: Sequence[RotatedSample], folder: Path) -> list[Path]:
    """Draw the first images of each orientation that have boxes, at most MAX_IMAGES, into a new or empty folder.

    Returns:
        The files, `FOLDER/<image id>.png`; a number follows where two splits have the same id.

    Raises:
        AnnotationError: the folder is not empty or cannot be written.
        ShardError: an image cannot be read.
    """
    drawn = []
    check_empty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for image, file, orientation in _choose(rotated):
            paths = (folder / f"{image.id:012d}{'' if k == 1 else f'-{k}'}.png" for k in count(1))
            path = next(path for path in paths if path not in drawn)
            _side_by_side(image, file, orientation).save(path)
            drawn.append(path)
    except OSError as error:
        raise AnnotationError(f"cannot write to --draw {folder}: {error.strerror or error}") from None
    return drawn


def describe_drawn(rotated: Sequence[RotatedSample], folder: Path) -> str:
    """Draw as `draw_both_ways`, if there is something to draw; returns a line that says what was done."""
    if not rotated:
        return "EXIF rotates no image: nothing to draw"
    drawn = draw_both_ways(rotated, folder)
    return f"{len(drawn)} images in {folder}: left their boxes as stored, right as displayed"


def check_empty(folder: Path) -> None:
    """Raise AnnotationError if the folder for the drawings is not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise AnnotationError(f"--draw {folder} is not empty or not a folder; give a new one")


def _choose(rotated: Sequence[RotatedSample]) -> list[RotatedSample]:
    """Take images of all orientations in turn, because a tool may apply one orientation and not another."""
    kinds: dict[int, list[RotatedSample]] = {}
    for sample in rotated:
        if sample[0].annotations:
            kinds.setdefault(sample[2], []).append(sample)
    mixed = chain.from_iterable(zip_longest(*(kinds[orientation] for orientation in sorted(kinds))))
    return [sample for sample in mixed if sample is not None][:MAX_IMAGES]


def _side_by_side(image: CocoImage, file: ImageFile, orientation: int) -> Image.Image:
    stored = decode(read_stored(file))
    halves = [_with_boxes(way, image.annotations) for way in (stored, turn_upright(stored, orientation))]
    width = max(CAPTION_WIDTH, *(half.width for half in halves))
    height = max(half.height for half in halves)
    canvas = Image.new("RGB", (2 * width + 3 * GAP, height + CAPTION + GAP), FRAME)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(CAPTION // 2)
    for number, (half, way) in enumerate(zip(halves, WAYS, strict=True)):
        left = GAP + number * (width + GAP)
        pen.text((left, CAPTION // 4), way, fill="black", font=font)
        canvas.paste(half, (left, CAPTION))
    return canvas


def _with_boxes(image: Image.Image, annotations: Sequence[dict[str, Any]]) -> Image.Image:
    """A copy scaled to LONGEST_SIDE, with the boxes of the annotation file."""
    scale = LONGEST_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = image.resize(size, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    for annotation in annotations:
        x, y, width, height = (scale * value for value in annotation["bbox"])
        if width > 0 and height > 0:
            for line, colour in ((4, FRAME), (2, INK)):
                pen.rectangle([x, y, x + width, y + height], outline=colour, width=line)
    return canvas
