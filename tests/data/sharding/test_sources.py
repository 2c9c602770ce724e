"""Folders, zips and tars give the same images; nothing in an archive is followed, guessed or trusted."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.data import contents, pack

from pipeline.data.sharding import sources
from pipeline.data.sharding.image_files import read_image_file
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.data.sharding.sources import find_image_files
from pipeline.errors import AnnotationError

NAMES = ["a.jpg", "b.jpg", "c.jpg"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for k, name in enumerate([*NAMES, "unused.txt"]):
        (path / name).write_bytes(name.encode() * (100 * k + 1))
    return path


def find(images: Path | str, names: list[str] = NAMES) -> tuple[dict[str, bytes], dict[Rule, list[str]]]:
    findings = Findings()
    found = find_image_files(str(images), names, findings)
    data = {name: read_image_file(file) for name, file in found.items()}
    return data, {rule: examples for rule, _, examples in findings}


@pytest.mark.parametrize("below", ["", "train2017/", "./", "./deep/er/"])
@pytest.mark.parametrize("suffix", ["stored.zip", "deflated.zip", "x.tar"])
def test_find_image_files_archives_equal_folder(tmp_path: Path, folder: Path, suffix: str, below: str) -> None:
    archive = pack(folder, tmp_path / suffix, below, zipfile.ZIP_DEFLATED if "deflated" in suffix else 0)
    expected = {name: (folder / name).read_bytes() for name in NAMES}
    assert find(archive) == find(folder) == (expected, {})


def test_find_image_files_folder_of_tars(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "tars").mkdir()
    for number, name in enumerate(NAMES):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as tar:
            tar.add(folder / name, f"train/{name}")
    assert find(tmp_path / "tars") == find(folder)
    with tarfile.open(tmp_path / "tars" / "9.tar", "w") as tar:
        tar.add(folder / "a.jpg", "train/a.jpg")
    assert find(tmp_path / "tars")[1] == {Rule.UNREADABLE_FILE: ["a.jpg occurs 2 times"]}


def test_find_image_files_stray_tar_does_not_hide_folder(folder: Path) -> None:
    (folder / "old.tar").write_bytes(b"no tar")
    assert find(folder)[1] == {}


def test_find_image_files_names_with_folders(tmp_path: Path, folder: Path) -> None:
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in ("root/2014/a.jpg", "root/2015/a.jpg", "other/2014/a.jpg", "a.jpg"):
            packed.writestr(name, name)
    data, faults = find(archive, ["2014/a.jpg", "2015/a.jpg"])
    assert data == {"2014/a.jpg": b"root/2014/a.jpg", "2015/a.jpg": b"root/2015/a.jpg"}
    assert faults == {}


@pytest.mark.parametrize("where", ["folder", "x.zip", "x.tar"])
def test_find_image_files_missing_is_finding(tmp_path: Path, folder: Path, where: str) -> None:
    images = folder if where == "folder" else pack(folder, tmp_path / where, "train/")
    data, faults = find(images, ["a.jpg", "none.jpg", "a.jpg/x.jpg", "n" * 300, "none.jpg"])
    assert list(data) == ["a.jpg"]
    missing = ["none.jpg", "a.jpg/x.jpg", "n" * 300]
    if where == "folder":
        assert faults == {
            Rule.MISSING_FILE: missing[:2],
            Rule.UNREADABLE_FILE: [f"{missing[2]} cannot be read: File name too long"],
        }
    else:
        assert faults == {Rule.MISSING_FILE: missing}


@pytest.mark.parametrize("where", ["folder", "stored.zip", "x.tar"])
def test_find_image_files_too_large_is_finding(
    tmp_path: Path, folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = folder if where == "folder" else pack(folder, tmp_path / where)
    monkeypatch.setattr(sources, "MAX_BYTES", 600)
    data, faults = find(images)
    assert list(data) == ["a.jpg", "b.jpg"][: len(data)]
    assert len(data) == 2 - ((folder / "b.jpg").stat().st_size > 600)
    assert all("over the cap 600" in fault for fault in faults[Rule.UNREADABLE_FILE])


def test_find_image_files_special_file_is_not_opened(tmp_path: Path, folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")  # opening it would wait for ever
    (folder / "folder.jpg").mkdir()
    (folder / "link.jpg").symlink_to(folder / "a.jpg")  # data sets are often made of links
    data, faults = find(folder, ["pipe.jpg", "folder.jpg", "link.jpg"])
    assert data == {"link.jpg": b"a.jpg"}
    assert faults == {Rule.UNREADABLE_FILE: ["pipe.jpg is not a plain file", "folder.jpg is not a plain file"]}


@pytest.mark.parametrize(
    ("kind", "what"),
    [(tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link"), (tarfile.GNUTYPE_SPARSE, "sparse file")],
)
def test_find_image_files_link_in_tar_is_not_followed(tmp_path: Path, kind: bytes, what: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = kind, str(secret)
        tar.addfile(member)
    data, faults = find(tmp_path / "x.tar", ["a.jpg"])
    assert data == {}
    assert faults == {Rule.UNREADABLE_FILE: [f"a.jpg is not a plain file but a {what} in its tar"]}


def test_find_image_files_climbing_name_stays_a_name(tmp_path: Path) -> None:
    before = contents(tmp_path)
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("../../evil.jpg", "evil")
        packed.writestr("/abs/a.jpg", "abs")
    assert find(archive, ["a.jpg"]) == ({"a.jpg": b"abs"}, {})
    archive.unlink()
    assert contents(tmp_path) == before


def test_find_image_files_member_without_name_is_skipped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr(zipfile.ZipInfo("a.jpg"), "1")
        packed.writestr(zipfile.ZipInfo("\0"), "2")  # zipfile cuts a name at the null byte
    assert find(tmp_path / "x.zip", ["a.jpg"]) == ({"a.jpg": b"1"}, {})


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_find_image_files_duplicate_member_is_finding(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("a.jpg", "1")
        packed.writestr("a.jpg", "2")
    assert find(tmp_path / "x.zip", ["a.jpg"]) == ({}, {Rule.UNREADABLE_FILE: ["a.jpg occurs 2 times"]})


def test_find_image_files_encrypted_or_unknown_compression_is_finding(tmp_path: Path) -> None:
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as packed:
        packed.writestr("a.jpg", "1")
    assert find(archive, ["a.jpg"])[1] == {Rule.UNREADABLE_FILE: ["a.jpg is compressed by another method than deflate"]}
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("a.jpg", "1")
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(data)
    assert find(archive, ["a.jpg"])[1] == {Rule.UNREADABLE_FILE: ["a.jpg is encrypted"]}


def test_find_image_files_other_path_is_refused(tmp_path: Path, folder: Path) -> None:
    archive = pack(folder, tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(folder / "a.jpg", "a.jpg")
    (tmp_path / "cut.tar").write_bytes(archive.read_bytes()[:-9000])
    pack(folder, tmp_path / "x.zip")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "x.zip").read_bytes()[:-30])
    (tmp_path / "note.txt").write_text("x")
    for images, message in (
        (tmp_path / "nowhere", "nowhere$"),
        (tmp_path / "nowhere.zip", r"nowhere\.zip$"),
        (tmp_path / "x.tar.gz", r"x\.tar\.gz "),
        (tmp_path / "cut.tar", r"cut\.tar "),
        (tmp_path / "cut.zip", r"cut\.zip "),
        (tmp_path / "note.txt", r"note\.txt "),
        ("s3://bucket/train", "s3://bucket/train"),
    ):
        with pytest.raises(AnnotationError, match=message):
            find(images)


def test_find_image_files_damaged_zip_is_refused(tmp_path: Path, folder: Path) -> None:
    archive = pack(folder, tmp_path / "x.zip")
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\1\2") + 1] = 0
    archive.write_bytes(data)
    with pytest.raises(AnnotationError, match=r"x\.zip "):
        find(archive)
    assert zipfile.is_zipfile(io.BytesIO(data))


def test_find_image_files_one_folder_deeper(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "more" / "empty").mkdir(parents=True)
    folder.rename(tmp_path / "more" / "train2017")
    assert find(tmp_path / "more")[0].keys() == set(NAMES)
    (tmp_path / "more" / "val2017").mkdir()
    (tmp_path / "more" / "val2017" / "a.jpg").write_bytes(b"a")
    assert find(tmp_path / "more")[0]["a.jpg"] != b"a", "the folder that holds the most of them"
    for name in NAMES:
        (tmp_path / "more" / "val2017" / name).write_bytes(b"a")
    with pytest.raises(AnnotationError, match=r"train2017 and .*val2017"):
        find(tmp_path / "more")
    (tmp_path / "more" / "b.jpg").write_bytes(b"b")
    assert find(tmp_path / "more") == ({"b.jpg": b"b"}, {Rule.MISSING_FILE: ["a.jpg", "c.jpg"]})


@pytest.mark.parametrize("names", [["./a.jpg", "b.jpg"], ["a.jpg", ".//b.jpg"], [".//a.jpg", "././b.jpg"]])
@pytest.mark.parametrize("members", [["./a.jpg", "b.jpg"], ["x/./a.jpg", "x//b.jpg"], ["./x/a.jpg", "x/b.jpg"]])
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_find_image_files_ignores_dots_and_double_slashes(
    tmp_path: Path, names: list[str], members: list[str], suffix: str
) -> None:
    archive = tmp_path / f"x{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for member in members:
                packed.writestr(member, member[-5:])
    else:
        with tarfile.open(archive, "w") as tar:
            for member in members:
                entry = tarfile.TarInfo(member)
                entry.size = 5
                tar.addfile(entry, io.BytesIO(member[-5:].encode()))
    assert find(archive, names) == ({names[0]: b"a.jpg", names[1]: b"b.jpg"}, {})


@pytest.mark.parametrize("where", ["folder", "x.zip", "x.tar"])
def test_find_image_files_unlisted_is_finding(tmp_path: Path, folder: Path, where: str) -> None:
    for name in ("._a.jpg", "refused.jpg", "Z.JPEG"):
        (folder / name).write_bytes(b"x")
    images = folder if where == "folder" else pack(folder, tmp_path / where, "train/")
    findings = Findings()
    find_image_files(str(images), ["./a.jpg", "c.jpg"], findings, {"refused.jpg"})
    assert list(findings) == [(Rule.UNLISTED_FILE, 2, ["Z.JPEG", "b.jpg"])]
