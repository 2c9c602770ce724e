"""Names of any script are readable in a drawing, and a drawing is known from a user's image."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.drawing import Prediction, _font, draw_detections, is_drawing, label_text, save_drawing

FONT = _font(14)


@pytest.mark.parametrize("name", ["person", "größe", "é", "łódź", "людина", "σκύλος", "Weißkopf–Adler"])
def test_label_text_every_letter_has_a_glyph(name: str) -> None:
    text = label_text(name, 7, 0.5, FONT, 640)
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
    assert label_text(name, 7, 0.5, FONT, 640) == f"{shown} 0.50"


def test_label_text_long_name_is_cut_to_the_width() -> None:
    text = label_text("a name of very many words " * 9, 7, 0.5, FONT, 200)
    assert FONT.getlength(text) <= 200 < FONT.getlength(text) + 20
    assert text.startswith("a name of")
    assert text.endswith("… 0.50")
    assert label_text("person", 7, 0.5, FONT, 1) == "… 0.50"


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
