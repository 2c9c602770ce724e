"""Names of any script are readable in a drawing, and a drawing is known from a user's image."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.drawing import (
    DrawnBox,
    Prediction,
    _font,
    draw_boxes,
    draw_detections,
    is_drawing,
    label_text,
    put_beside,
    save_drawing,
)

FONT = _font(14)


@pytest.mark.parametrize("name", ["person", "größe", "é", "łódź", "людина", "σκύλος", "Weißkopf–Adler"])
def test_label_text_every_letter_has_a_glyph(name: str) -> None:
    text = label_text(name, 7, "0.50", FONT, 640)
    assert text == f"{name} 0.50"
    missing = bytes(FONT.getmask("\uffff"))
    assert not [letter for letter in text if bytes(FONT.getmask(letter)) == missing]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (unicodedata.normalize("NFD", "größe"), "größe"),  # as macOS writes names
        ("traffic\n\tlight ", "traffic light"),
        ("中文", "#7"),
        ("cat 🙂", "#7"),
    ],
)
def test_label_text_what_the_font_cannot_draw_is_replaced(name: str, shown: str) -> None:
    assert label_text(name, 7, "0.50", FONT, 640) == f"{shown} 0.50"


def test_label_text_long_name_is_cut_to_the_width() -> None:
    text = label_text("a name of very many words " * 9, 7, "0.50", FONT, 200)
    assert FONT.getlength(text) <= 200 < FONT.getlength(text) + 20
    assert text.startswith("a name of")
    assert text.endswith("… 0.50")
    assert label_text("person", 7, "0.50", FONT, 1) == "… 0.50"


def test_draw_labels_of_equal_boxes_are_all_visible() -> None:
    count = 12
    prediction = Prediction(
        boxes=[[200.0, 200.0, 80.0, 60.0]] * count,
        scores=[0.9] * count,
        labels=["größe"] * count,
        category_ids=list(range(1, count + 1)),
    )
    drawn = np.array(draw_detections(Image.new("RGB", (640, 480)), prediction))
    alone = [
        draw_detections(
            Image.new("RGB", (640, 480)), Prediction(**{key: [value[k]] for key, value in prediction.items()})
        )  # type: ignore[typeddict-item]
        for k in range(count)
    ]
    for image in alone:  # a label hides boxes and lines, never another label: as many of its pixels as when alone
        colours, counts = np.unique(np.array(image).reshape(-1, 3), axis=0, return_counts=True)
        colour = colours[counts.argsort()[-2]]  # after the black background
        label = (np.array(image)[170:200] == colour).all(-1).sum()
        assert (drawn == colour).all(-1).sum() >= label


def test_label_text_without_a_note_is_the_name() -> None:
    assert label_text("person", 7, "", FONT, 640) == "person"


def test_draw_boxes_longest_side_is_set_and_boxes_move_along() -> None:
    box = DrawnBox([100, 50, 60, 40], 1, "cat", "missed", (255, 0, 0))
    for size, longest in (((640, 480), 320), ((64, 128), 320), ((640, 480), None)):
        image = Image.new("RGB", size)
        drawn = draw_boxes(image, [box], longest)
        scale = max(drawn.size) / max(size)
        assert max(drawn.size) == (longest or 640)
        right, bottom = round(160 * scale), round(90 * scale)
        if right < drawn.width and bottom < drawn.height:
            assert drawn.getpixel((right, bottom)) == (255, 0, 0)


def test_draw_boxes_without_name_and_note_has_no_label() -> None:
    box = DrawnBox([100, 50, 60, 40], 1, "", "", (255, 0, 0))
    drawn = np.array(draw_boxes(Image.new("RGB", (640, 480)), [box]))
    rows, columns = np.nonzero((drawn == (255, 0, 0)).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (50, 90, 100, 160)


def test_put_beside_keeps_the_pixels_of_each_panel() -> None:
    panels = [("one", Image.new("RGB", (60, 40), "red")), ("two", Image.new("RGB", (60, 40), "blue"))]
    drawn = put_beside(panels)
    pixels = np.array(drawn)
    assert (pixels == (255, 0, 0)).all(-1).sum() == (pixels == (0, 0, 255)).all(-1).sum() == 60 * 40
    assert drawn.width > 120
    assert drawn.height > 40


def test_is_drawing_only_own_files(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    save_drawing(image, tmp_path / "new" / "own.png")
    assert is_drawing(tmp_path / "new" / "own.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["own.png"]
    image.save(tmp_path / "user.png")
    image.save(tmp_path / "jpeg.png", "JPEG")
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "link.png").symlink_to(tmp_path / "new" / "own.png")
    for name in ("user.png", "jpeg.png", "text.png", "link.png", "absent.png", "new"):
        assert not is_drawing(tmp_path / name)
