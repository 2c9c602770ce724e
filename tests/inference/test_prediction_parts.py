"""Unfinished predictions: what is kept, what is thrown away, and who may write."""

from pathlib import Path

import pytest

from pipeline.errors import RunError, StorageError
from pipeline.inference.prediction_parts import PART_IMAGES, PartFolder

IMAGES = 2 * PART_IMAGES + 3


def row(number: int) -> dict[str, object]:
    return {"scores": [number / 7]}


def test_part_folder_keeps_whole_parts_and_asks_for_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "parts"
    with PartFolder(folder, "digest", IMAGES) as parts:
        assert parts.missing() == list(range(IMAGES))
        for number in (*range(PART_IMAGES, IMAGES), 0, 1):  # out of order; the first part stays incomplete
            parts.add(number, row(number))
        assert parts.missing() == list(range(PART_IMAGES))
    with PartFolder(folder, "digest", IMAGES) as parts:
        assert parts.missing() == list(range(PART_IMAGES)), "rows of an incomplete part are done again"
        for number in range(PART_IMAGES):
            parts.add(number, row(number))
        assert list(parts.rows()) == [(number, row(number)) for number in range(IMAGES)]
        with pytest.raises(AssertionError, match="two results"):
            parts.add(0, row(0))
        parts.remove()
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"[", b"[1]", b"{}"])
def test_part_folder_damaged_part_is_done_again(content: bytes, tmp_path: Path) -> None:
    with PartFolder(tmp_path / "parts", "digest", 3) as parts:
        for number in range(3):
            parts.add(number, row(number))
    (file,) = (tmp_path / "parts").glob("part-*")
    file.write_bytes(content)
    with PartFolder(tmp_path / "parts", "digest", 3) as parts:
        assert parts.missing() == [0, 1, 2]


def test_part_folder_of_another_request_starts_again(tmp_path: Path) -> None:
    with PartFolder(tmp_path / "parts", "digest", 1) as parts:
        parts.add(0, row(0))
    with PartFolder(tmp_path / "parts", "other", 1) as parts:
        assert parts.missing() == [0]


def test_part_folder_foreign_files_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.txt").write_text("keep")
    with pytest.raises(StorageError, match=r"mine\.txt"), PartFolder(tmp_path / "parts", "digest", 1):
        pass
    assert (tmp_path / "parts" / "mine.txt").read_text() == "keep"


def test_part_folder_second_process_is_refused(tmp_path: Path) -> None:
    with (
        PartFolder(tmp_path / "parts", "digest", 1),
        pytest.raises(RunError, match="in use"),
        PartFolder(tmp_path / "parts", "digest", 1),
    ):
        pass


def test_part_folder_that_cannot_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/parts"), PartFolder(tmp_path / "file" / "parts", "digest", 1):
        pass
