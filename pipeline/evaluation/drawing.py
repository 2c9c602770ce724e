"""A picture with its detections drawn on it, what a picture's detections are, and PNG files of such pictures.

A file carries MARK as a text chunk, so that a later call knows it from a user's picture and may replace it. Importing
this module needs Pillow alone, so that a registered model loads quickly.
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from pipeline.data.images import to_rgb
from pipeline.outputs import derive_names
from pipeline.storage import replacing

DRAWN_SIDE = 640  # smaller pictures are enlarged to about this longest side, so that their labels can be read
GOLDEN_RATIO = 0.61803398875
MARK = ("Software", "deformable-detr-pipeline")  # key (of the PNG standard) and value of the text chunk


class Prediction(TypedDict):
    """One picture's detections, best first; the four lists have equal length."""

    boxes: list[list[float]]  # [x, y, width, height] in pixels of the picture as it came
    scores: list[float]
    labels: list[str]
    category_ids: list[int]


def draw(image: Image.Image, prediction: Prediction) -> Image.Image:
    """A copy of `image` with boxes, class names and scores; best detections on top, small pictures enlarged."""
    scale = max(1, DRAWN_SIDE // max(image.size))
    canvas = to_rgb(image).resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(canvas)
    line = max(2, round(max(canvas.size) / 400))
    font = ImageFont.load_default(max(11, round(max(canvas.size) / 55)))
    rows = zip(*(prediction[k] for k in ("boxes", "scores", "labels", "category_ids")), strict=True)
    for (x, y, width, height), score, name, category in reversed(list(rows)):
        box = [scale * value for value in (x, y, x + max(width, 0), y + max(height, 0))]
        colour = class_colour(category)
        pen.rectangle(box, outline=colour, width=line)
        text = f"{name} {score:.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        label_width, label_height = right - left + 2 * line, bottom - top + 2 * line
        # above the box where there is room, else inside it; never outside the picture
        label_y = box[1] - label_height if box[1] >= label_height else max(box[1], 0)
        label_x = min(max(box[0], 0), max(canvas.width - label_width, 0))
        pen.rectangle([label_x, label_y, label_x + label_width, label_y + label_height], fill=colour)
        pen.text((label_x + line - left, label_y + line - top), text, fill=_ink(colour), font=font)
    return canvas


def drawing_paths(folder: Path, images: Sequence[Path], prefix: str = "") -> list[Path]:
    """Where the drawings of `images` go in `folder`; no file that `save_drawing` did not write has such a name."""
    return derive_names(folder, images, ".png", is_drawing, prefix)


def save_drawing(picture: Image.Image, path: Path) -> None:
    """Write what `draw` gave as a PNG file with MARK, by rename; its folder is made. Raises OSError."""
    chunks = PngInfo()
    chunks.add_text(*MARK)
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=chunks)


def is_drawing(path: Path) -> bool:
    """Whether `path` is a PNG file that `save_drawing` wrote; a link is none."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get(MARK[0]) == MARK[1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def class_colour(category: int) -> tuple[int, int, int]:
    """A bright colour; neighbouring category ids are far apart on the colour wheel."""
    red, green, blue = colorsys.hsv_to_rgb(category * GOLDEN_RATIO % 1.0, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _ink(colour: tuple[int, int, int]) -> str:
    """Black on light colours, white on dark ones (luma of Rec. 601)."""
    return "black" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 130 else "white"
