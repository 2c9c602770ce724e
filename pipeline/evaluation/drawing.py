"""A picture with its detections drawn on it, what a picture's detections are, and PNG files of such pictures.

A file carries MARK as a text chunk, so that a later call knows it from a user's picture and may replace it. Importing
this module needs Pillow alone, so that a registered model loads quickly.
"""

import colorsys
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypedDict

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from pipeline.data.images import to_rgb
from pipeline.evaluation.label_layout import place_labels
from pipeline.files.atomic import replace_file
from pipeline.files.outputs import derive_names

DRAWN_SIDE = 640  # smaller pictures are enlarged to about this longest side, so that their labels can be read
GOLDEN_RATIO = 0.61803398875
THRESHOLD, TOP_K = 0.3, 100  # lowest score and most detections of a picture that are shown by default
Exif = Literal["apply", "ignore"]  # what becomes of a picture's orientation
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom
MARK = ("Software", "deformable-detr-pipeline")  # key (of the PNG standard) and value of the text chunk


class Prediction(TypedDict):
    """One picture's detections, best first; the four lists have equal length."""

    boxes: list[list[float]]  # [x, y, width, height] in pixels of the picture as `predictor.read_image` gives it
    scores: list[float]
    labels: list[str]
    category_ids: list[int]


def draw(image: Image.Image, prediction: Prediction) -> Image.Image:
    """A copy of `image` with boxes, class names and scores; best detections on top, small pictures enlarged.

    Args:
        image: the pixels that the boxes are of, as `predictor.read_image` gives them; an EXIF tag is not applied.
        prediction: of this picture.
    """
    scale = max(1, DRAWN_SIDE // max(image.size))
    canvas = to_rgb(image).resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(canvas)
    line = max(2, round(max(canvas.size) / 400))
    font = _font(max(11, round(max(canvas.size) / 55)))
    scaled = ([scale * value for value in box] for box in prediction["boxes"])
    boxes = [(x, y, x + max(width, 0), y + max(height, 0)) for x, y, width, height in scaled]
    colours = [class_colour(category) for category in prediction["category_ids"]]
    rows = zip(prediction["labels"], prediction["category_ids"], prediction["scores"], strict=True)
    texts = [label_text(*row, font, canvas.width - 2 * line) for row in rows]
    extents = [pen.textbbox((0, 0), text, font=font) for text in texts]
    ascent, descent = font.getmetrics()  # all labels have the height of a line, so that their texts stand alike
    sizes = [(right - left + 2 * line, ascent + descent) for left, _, right, _ in extents]
    places = place_labels(boxes, sizes, canvas.size)
    labels = [(x, y, x + width - 1, y + height - 1) for (x, y), (width, height) in zip(places, sizes, strict=True)]
    # the best detection last and so on top; labels above all boxes and lines
    for box, label, colour in list(zip(boxes, labels, colours, strict=True))[::-1]:
        pen.rectangle(box, outline=colour, width=line)
        pen.line(_shortest_line(label, box), fill=colour, width=line)  # a point, unless the label had to move away
    for label, colour, text, extent in list(zip(labels, colours, texts, extents, strict=True))[::-1]:
        pen.rectangle(label, fill=colour)
        pen.text((label[0] + line - extent[0], label[1]), text, fill=_ink(colour), font=font)
    return canvas


def label_text(name: str, category: int, score: float, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Name and score in one line of at most `width` pixels; `#ID` for a name with characters that the font lacks."""
    name = " ".join(unicodedata.normalize("NFC", name).split())  # composed letters, no tabs and no line breaks
    if not _characters().issuperset(map(ord, name)):
        name = f"#{category}"
    shown = name
    while font.getlength(f"{shown} {score:.2f}") > width and len(shown) > 1:
        name = name[:-1]
        shown = f"{name}…"
    return f"{shown} {score:.2f}"


def drawing_paths(folder: Path, images: Sequence[Path], prefix: str = "") -> list[Path]:
    """Where the drawings of `images` go in `folder`; no file that `save_drawing` did not write has such a name."""
    return derive_names(folder, images, ".png", is_drawing, prefix)


def save_drawing(picture: Image.Image, path: Path) -> None:
    """Write what `draw` gave as a PNG file with MARK, by rename; its folder is made. Raises OSError."""
    chunks = PngInfo()
    chunks.add_text(*MARK)
    with replace_file(path) as temporary:
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


def _shortest_line(label: Rectangle, box: Rectangle) -> Rectangle:
    """From a point of `label` to one of `box`, as x and y of both; of length 0 if they meet."""
    ends = []
    for k in (0, 1):
        low, high = max(label[k], box[k]), min(label[k + 2], box[k + 2])
        if low <= high:  # the middle of what they share along this axis
            ends.append(((low + high) / 2, (low + high) / 2))
        else:  # the two sides that face each other
            ends.append((high, low) if label[k] < box[k] else (low, high))
    (x0, x1), (y0, y1) = ends
    return x0, y0, x1, y1


@cache
def _font_path() -> str:
    from matplotlib import get_data_path  # only a drawing needs it

    return f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # Latin, Greek, Cyrillic, Arabic, ...; matplotlib brings it


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
