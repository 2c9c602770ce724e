"""What `finetune.json` remembers, what tells two data sets apart, and which folders are free."""

import os
from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.files.atomic import temporary_name
from pipeline.launch.finetune.project import FILE, fingerprint_of, read_project


def test_fingerprint_sees_a_changed_byte_of_an_image_and_no_time(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    image, label = tmp_path / "a/1.jpg", tmp_path / "a/1.txt"
    image.write_bytes(b"pixels")
    label.write_text("0 0.5 0.5 0.1 0.1")
    before = fingerprint_of(str(tmp_path / "a"))
    image.touch()
    assert fingerprint_of(str(tmp_path / "a")) == before
    image.write_bytes(b"pixelz")
    assert fingerprint_of(str(tmp_path / "a")) != before


def test_fingerprint_takes_names_that_are_not_unicode(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"pixels")
    before = fingerprint_of(str(tmp_path))
    Path(os.fsdecode(bytes(tmp_path) + b"/v\xf6gel.jpg")).write_bytes(b"pixels")
    assert fingerprint_of(str(tmp_path)) != before


@pytest.mark.parametrize("content", ["", "[]", '{"version": 9}', '{"version": 1, "dataset": "x"}'])
def test_read_project_refuses_a_damaged_file(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(RunError, match=FILE):
        read_project(tmp_path)


def test_read_project_refuses_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(RunError, match="Permission denied; set storage"):
        read_project(tmp_path)


def test_read_project_finds_a_folder_free_that_a_killed_first_write_left(tmp_path: Path) -> None:
    (tmp_path / temporary_name(FILE)).touch()
    assert read_project(tmp_path) is None
    (tmp_path / "other").touch()
    with pytest.raises(RunError, match=FILE):
        read_project(tmp_path)
