"""The drawn export: the same bytes for a seed, boxes inside the image, nothing half-written."""

import json
import zipfile
from pathlib import Path

import pytest

from pipeline.data.importing import drawn_export
from pipeline.data.importing.drawn_export import ANNOTATIONS, CLASSES, draw_cells, write_export


@pytest.mark.parametrize("size", [8, 32, 96])
def test_draw_cells_keeps_every_box_inside_an_image_of_any_size(size: int) -> None:
    image, boxes = draw_cells(size, 0, 1)
    assert image.size == (size, size)
    for label, (x, y, width, height) in boxes:
        assert label in CLASSES[1:]
        assert min(x, y, width, height) >= 0
        assert max(x + width, y + height) <= size + 0.01  # rounded


def test_write_export_has_the_same_bytes_for_a_seed_and_other_images_for_another(tmp_path: Path) -> None:
    first, again, other = (
        write_export(tmp_path / name / "e.zip", {"train": 1}, 48, seed).read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other
    with zipfile.ZipFile(tmp_path / "a" / "e.zip") as archive:
        tree = json.loads(archive.read(f"train/{ANNOTATIONS}"))
    assert {each["category_id"] for each in tree["annotations"]} <= {1, 2, 3}


def test_write_export_that_is_interrupted_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drawn_export, "draw_cells", stop)
    with pytest.raises(KeyboardInterrupt):
        write_export(tmp_path / "e.zip", {"train": 1})
    assert list(tmp_path.iterdir()) == []
