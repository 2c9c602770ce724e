"""Inputs and foreign files are never overwritten, for any given or derived names."""

import os
import re
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import index
from pipeline.data.sharding import summary
from pipeline.errors import InputError, StorageError
from pipeline.files.outputs import RECORDS, check_output, check_outputs, derive_names, write_text
from pipeline.model.weights import files
from pipeline.runs import evaluations, record

STEMS = st.sampled_from(["a", "A", "a-2", "a-3", "b"])
SUFFIXES = st.sampled_from([".png", ".jpg", ".PNG"])


@settings(deadline=None)
@given(
    inputs=st.lists(st.tuples(st.sampled_from(["out", "other"]), STEMS, SUFFIXES), min_size=1, max_size=6),
    foreign=st.sets(st.tuples(STEMS, SUFFIXES)),
    own=st.sets(STEMS),
)
def test_derive_names_any_folder_gives_distinct_free_names(
    inputs: list[tuple[str, str, str]],
    foreign: set[tuple[str, str]],
    own: set[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("names")
    paths = [root / folder / f"{stem}{suffix}" for folder, stem, suffix in inputs]
    before = {root / "out" / f"{stem}{suffix}" for stem, suffix in foreign} | {*paths}
    ours = {root / "out" / f"{stem}.png" for stem in own} - before
    for path in before | ours:
        path.parent.mkdir(exist_ok=True)
        path.write_text("own" if path in ours else "foreign")
    names = derive_names(root / "out", paths, ".png", lambda path: path.is_file() and path.read_text() == "own")
    assert len({str(name).casefold() for name in names}) == len(paths)
    assert not before & set(names)
    assert all(name.parent == root / "out" and name.suffix == ".png" for name in names)
    first = root / "out" / f"{paths[0].stem}.png"
    if not {str(p).casefold() for p in before} & {str(first).casefold()}:
        assert names[0] == first


def test_derive_names_link_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "target.png").write_text("own")
    (tmp_path / "a.png").symlink_to(tmp_path / "target.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "absent")
    found = derive_names(tmp_path, [Path("a.jpg"), Path("b.jpg")], ".png", lambda path: False)
    assert [path.name for path in found] == ["a-2.png", "b-2.png"]


def test_check_output_input_or_unwritable_path_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    results = tmp_path / "results.json"
    results.touch()
    (tmp_path / "link.json").symlink_to(results)
    os.mkfifo(tmp_path / "fifo")
    for wrong in (
        "results.json",
        "link.json",
        "checkpoint/x.pt2",
        "checkpoint",
        "results.json/x",
        "fifo",
        "new/../results.json",
    ):
        with pytest.raises(InputError, match=re.escape(wrong)):
            check_output(tmp_path / wrong, [results, checkpoint])
    for good in ("new.json", "new/folder/x.json", "checkpoint.json"):
        check_output(tmp_path / good, [results, checkpoint])
    assert not (tmp_path / "new").exists()


def test_write_text_replaces_whole_files_and_follows_links(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    with real.open() as reader:
        write_text(link, "größe")
        assert reader.read() == "old"  # renamed over, not written into
    assert link.is_symlink()
    assert real.read_bytes() == "größe".encode()
    write_text(tmp_path / "made" / "x.json", "")
    with pytest.raises(StorageError, match=r"real\.json/x\.json"):
        write_text(real / "x.json", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "made", "real.json"]


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_check_output_existing_record_is_refused(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / name)
    (tmp_path / name).write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / name)
    for path in (tmp_path / name, tmp_path / "link.json"):
        with pytest.raises(InputError, match=path.name):
            check_output(path)


def test_check_output_database_with_any_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE runs (id INTEGER)")
    database.close()
    with pytest.raises(InputError, match=path.name):
        check_output(path)


def test_records_match_written_names() -> None:
    assert {record.FILE, evaluations.FILE, files.STATE, record.CHECKPOINT_LIST} <= RECORDS
    assert {index.INDEX, index.SAMPLES, summary.SUMMARY} <= RECORDS


def test_check_outputs_one_in_the_way_of_another_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    check_outputs([one, other])
    (tmp_path / "link").symlink_to(tmp_path)
    for clash in (one, tmp_path / "link" / "a.json", one / "image.png"):
        for pair in ([one, clash], [clash, one]):
            with pytest.raises(InputError, match="cannot both be written"):
                check_outputs(pair)
    with pytest.raises(InputError, match="input of this command"):
        check_outputs([one, other], [other])
