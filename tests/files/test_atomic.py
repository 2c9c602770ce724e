"""Local files are replaced whole or not at all, under temporary names that are unique."""

from pathlib import Path

import pytest

from pipeline.files.atomic import UNFINISHED, remove_unfinished, replace_file, temporary_name, write_file


def test_replace_file_exception_keeps_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for text in ("first", "second"):
        with replace_file(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    with pytest.raises(FileNotFoundError), replace_file(path) as temporary:
        temporary.unlink(missing_ok=True)  # nothing was written, so nothing can replace the file
    with pytest.raises(IsADirectoryError), replace_file(path) as temporary:
        temporary.write_bytes(tmp_path.read_bytes())
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FileExistsError), replace_file(path / "below"):
        raise AssertionError("a file has no files below it")


def test_replace_file_two_writers_have_different_temporary_files(tmp_path: Path) -> None:
    """Nodes share a folder and may have equal process ids."""
    path = tmp_path / "archive.pt2"
    with replace_file(path) as first, replace_file(path) as second:
        assert first != second
        assert {first.suffix, second.suffix} == {".pt2"}  # torch.export checks it
        for temporary in (first, second):
            temporary.write_bytes(b"x")
    assert [each.name for each in tmp_path.iterdir()] == ["archive.pt2"]


def test_write_file_link_keeps_the_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    write_file(link, b"content")
    assert link.is_symlink()
    assert real.read_bytes() == b"content"


def test_temporary_name_matches_unfinished() -> None:
    assert UNFINISHED.match(temporary_name("run.json"))
    assert not UNFINISHED.match("run.json")


def test_remove_unfinished_removes_what_killed_writers_of_these_files_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "b.json")
    gone = [temporary_name("a.json"), temporary_name("a.json"), f"real/{temporary_name('b.json')}"]
    kept = ["a.json", ".a.json", temporary_name("other.json"), temporary_name("b.json"), "real/b.json"]
    for name in (*gone, *kept):
        (tmp_path / name).touch()
    remove_unfinished([tmp_path / "a.json", tmp_path / "link.json", tmp_path / "absent" / "c.json"])
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, "link.json"}
