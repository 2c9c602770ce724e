"""Images with detections or objects drawn on them, the type of an image's detections, and files of such drawings.

A file carries MARK as a text chunk or comment, so that a later call can distinguish it from a user's image and replace
it. Importing this module needs Pillow only, so that a registered model loads quickly. A file that cannot be written is
an OSError.
"""

import colorsys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypedDict

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from pipeline.data.images import to_rgb
from pipeline.evaluation.label_layout import place_labels
from pipeline.files.atomic import replace_file
from pipeline.files.outputs import derive_names

DRAWN_SIDE = 640  # pixels; smaller images are enlarged to about this longest side, so that labels can be read
GOLDEN_RATIO = 0.61803398875
THRESHOLD, TOP_K = 0.3, 100  # defaults: lowest score and largest number of detections of an image
Exif = Literal["apply", "ignore"]  # whether an image's EXIF orientation is applied
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom
MARK = ("Software", "deformable-detr-pipeline")  # key (of the PNG standard) and value of the text chunk; JPEG: comment
JPEG_QUALITY = 90  # labels stay sharp


class Prediction(TypedDict):
    """One image's detections, best first; the four lists have equal length."""

    boxes: list[list[float]]  # [x, y, width, height] in pixels of the image as `predictor.read_image` returns it
    scores: list[float]
    labels: list[str]
    category_ids: list[int]


@dataclass(frozen=True)
class DrawnBox:
    """A box to be drawn, with its label; a box without name and note has none."""

    box_xywh: Sequence[float]  # pixels of the image
    category_id: int
    name: str
    note: str  # after the name, e.g. the score
    colour: tuple[int, int, int]


def draw_detections(image: Image.Image, prediction: Prediction) -> Image.Image:
    """A copy of `image` with boxes, class names and scores; best detections on top, small images enlarged.

    Args:
        image: the pixels that the boxes refer to, as `predictor.read_image` returns them; an EXIF tag is not applied.
        prediction: of this image.
    """
    rows = zip(*(prediction[key] for key in ("boxes", "category_ids", "labels", "scores")), strict=True)
    boxes = [DrawnBox(box, id_, name, f"{score:.2f}", class_colour(id_)) for box, id_, name, score in rows]
    return draw_boxes(image, boxes)


def draw_boxes(image: Image.Image, boxes: Sequence[DrawnBox], longest: int | None = None) -> Image.Image:
    """A copy of `image` with boxes and labels; the first box is on top, small images are enlarged.

    Args:
        image: the pixels that the boxes refer to.
        boxes: most important first.
        longest: pixels of the longest side of the copy; by default large images keep their size.
    """
    scale = longest / max(image.size) if longest else max(1, DRAWN_SIDE // max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = to_rgb(image).resize(size, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(canvas)
    line = max(2, round(max(canvas.size) / 400))
    font = _font(max(11, round(max(canvas.size) / 55)))
    scaled = ([scale * value for value in box.box_xywh] for box in boxes)
    corners = [(x, y, x + max(width, 0), y + max(height, 0)) for x, y, width, height in scaled]
    labelled = [place for place, box in enumerate(boxes) if box.name or box.note]
    texts = [
        label_text(boxes[place].name, boxes[place].category_id, boxes[place].note, font, canvas.width - 2 * line)
        for place in labelled
    ]
    extents = [pen.textbbox((0, 0), text, font=font) for text in texts]
    ascent, descent = font.getmetrics()  # all labels have the height of a line, so that their texts are aligned
    sizes = [(right - left + 2 * line, ascent + descent) for left, _, right, _ in extents]
    spots = place_labels([corners[place] for place in labelled], sizes, canvas.size)
    labels = {
        place: (x, y, x + width - 1, y + height - 1)
        for place, (x, y), (width, height) in zip(labelled, spots, sizes, strict=True)
    }
    # The first box is drawn last, so it is on top; labels are above all boxes and lines.
    for place, (corner, box) in list(enumerate(zip(corners, boxes, strict=True)))[::-1]:
        pen.rectangle(corner, outline=box.colour, width=line)
        if place in labels:  # a line of length 0, if the label touches its box
            pen.line(_shortest_line(labels[place], corner), fill=box.colour, width=line)
    for place, text, extent in list(zip(labelled, texts, extents, strict=True))[::-1]:
        label, colour = labels[place], boxes[place].colour
        pen.rectangle(label, fill=colour)
        pen.text((label[0] + line - extent[0], label[1]), text, fill=_ink(colour), font=font)
    return canvas


def put_beside(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Images of one height beside each other, with a title above each."""
    gap = max(2, round(panels[0][1].height / 100))
    font = _font(max(12, round(max(panels[0][1].size) / 45)))
    strip = sum(font.getmetrics()) + gap
    width = sum(image.width for _, image in panels) + gap * (len(panels) - 1)
    canvas = Image.new("RGB", (width, strip + panels[0][1].height), "white")
    pen, left = ImageDraw.Draw(canvas), 0
    for title, image in panels:
        pen.text((left, 0), title, fill="black", font=font)
        canvas.paste(image, (left, strip))
        left += image.width + gap
    return canvas


def label_text(name: str, category: int, note: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Name and note in one line of at most `width` pixels; `#ID` if the font lacks a character of the name."""
    name = " ".join(unicodedata.normalize("NFC", name).split())  # composed letters, no tabs, no line breaks
    if not _characters().issuperset(map(ord, name)):
        name = f"#{category}"
    shown = name
    while font.getlength(f"{shown} {note}".rstrip()) > width and len(shown) > 1:
        name = name[:-1]
        shown = f"{name}…"
    return f"{shown} {note}".rstrip()


def drawing_paths(folder: Path, images: Sequence[Path], prefix: str = "", suffix: str = ".png") -> list[Path]:
    """The paths for the drawings of `images` in `folder`; none of them is a file that `save_drawing` did not write."""
    return derive_names(folder, images, suffix, is_drawing, prefix)


def save_drawing(image: Image.Image, path: Path) -> None:
    """Write a drawing with MARK, by rename, as JPEG (`.jpg`) or PNG; its folder is created. Raises OSError."""
    chunks = PngInfo()
    chunks.add_text(*MARK)
    with replace_file(path) as temporary:
        if path.suffix == ".jpg":
            image.save(temporary, "JPEG", quality=JPEG_QUALITY, comment=MARK[1])
        else:
            image.save(temporary, "PNG", pnginfo=chunks)


def is_drawing(path: Path) -> bool:
    """Whether `path` is a PNG or JPEG file that `save_drawing` wrote; False for a link."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            return MARK[1] in (image.info.get(MARK[0]), image.info.get("comment", b"").decode("latin-1"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def class_colour(category: int) -> tuple[int, int, int]:
    """A bright colour; consecutive category ids are far apart on the colour wheel."""
    red, green, blue = colorsys.hsv_to_rgb(category * GOLDEN_RATIO % 1.0, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _shortest_line(label: Rectangle, box: Rectangle) -> Rectangle:
    """The shortest line from `label` to `box`, as x and y of both ends; of length 0 if they touch."""
    ends = []
    for k in (0, 1):
        low, high = max(label[k], box[k]), min(label[k + 2], box[k + 2])
        if low <= high:  # the middle of their common range on this axis
            ends.append(((low + high) / 2, (low + high) / 2))
        else:  # the two sides that face each other
            ends.append((high, low) if label[k] < box[k] else (low, high))
    (x0, x1), (y0, y1) = ends
    return x0, y0, x1, y1


@cache
def _font_path() -> str:
    from matplotlib import get_data_path  # only a drawing needs it

    return f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # a part of matplotlib; Latin, Greek, Cyrillic, Arabic, ...


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_path(), size)


@cache
def _characters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_path()).get_charmap())


def _ink(colour: tuple[int, int, int]) -> str:
    """Black on light colours, white on dark ones (luma of Rec. 601)."""
    return "black" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 130 else "white"
