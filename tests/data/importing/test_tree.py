"""Names of a tree: relative, one each, the same for folder and archive; hostile archives of any kind change nothing."""

import io
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.data import contents
from support.layouts import pack_tree

from pipeline.data.importing.layouts import recognise
from pipeline.data.importing.tree import open_tree, split_of, split_of_path
from pipeline.data.sharding.rules import Findings
from pipeline.errors import AnnotationError

PARTS = st.sampled_from(
    ["..", ".", "", "a", "b.jpg", "train", "labels", "images", "c:", "x\0y", "é.png", "data.yaml", "obj.names", "1.txt"]
)
NAMES = st.lists(PARTS, min_size=1, max_size=4).flatmap(
    lambda parts: st.sampled_from(["/".join(parts), "\\".join(parts), "/" + "/".join(parts)])
)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"?"])
DATA = st.sampled_from(
    [b"", b"0 .5 .5 .1 .1", b"names: [a]", b'{"images": [], "annotations": [', b"<annotation>", b'{"shapes": [1]}']
) | st.binary(max_size=20)
MEMBERS = st.lists(st.tuples(NAMES, KINDS, DATA), max_size=6)


def write_folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(members=MEMBERS, packed=st.booleans(), cut=st.integers(0, 600))
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")  # zipfile, when the test writes it
def test_hostile_archive_gives_plain_names_or_an_error(
    tmp_path: Path, members: list[tuple[str, bytes, bytes]], packed: bool, cut: int
) -> None:
    buffer = io.BytesIO()
    if packed:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, _, data in members:
                archive.writestr(zipfile.ZipInfo(name), data)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, kind, data in members:
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "../../etc/passwd"
                member.size = len(data) if kind == tarfile.REGTYPE else 0
                tar.addfile(member, io.BytesIO(data) if member.size else None)
    path = tmp_path / "x.bin"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) - cut] if cut < 500 else buffer.getvalue())
    before = contents(tmp_path)
    try:
        tree = open_tree(str(path))
        layout, _ = recognise(tree)
        for split in layout.read(tree, "auto", Findings()):
            list(split.entries())
        names = [PurePosixPath(name) for name in tree.entries]
        message = str(path)
    except AnnotationError as error:
        names, message = [], str(error)
    assert str(path) in message
    assert all(not name.is_absolute() and ".." not in name.parts for name in names)
    assert contents(tmp_path) == before, "nothing is written"


def test_open_tree_names_do_not_depend_on_the_container(tmp_path: Path) -> None:
    leftovers = (
        "train/.hidden.jpg",
        "__MACOSX/._a.jpg",
        ".DS_Store",
        "train/Thumbs.db",
        "train/@eaDir/a.jpg/x.jpg",
    )
    folder = write_folder(tmp_path / "set", "train/a.jpg", "val/é.txt", *leftovers)
    archives = [pack_tree(folder, tmp_path / "x.zip"), pack_tree(folder, tmp_path / "x.tar", "wrapped/set/")]
    for source in (folder, tmp_path / "x.zip", tmp_path / "x.tar"):
        tree = open_tree(str(source))
        assert list(tree.entries) == ["train/a.jpg", "val/é.txt"]
        assert tree.read("train/a.jpg") == b"train/a.jpg"
        assert tree.text("val/é.txt") == "val/é.txt"
    assert len(archives) == 2


@pytest.mark.parametrize("name", ["train/a.jpg", "images/a.jpg", "Annotations/a.xml"])
def test_open_tree_keeps_folders_that_mean_something(tmp_path: Path, name: str) -> None:
    assert list(open_tree(str(write_folder(tmp_path / "x", name))).entries) == [name]


def test_open_tree_decomposed_and_unflagged_names_are_found(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "ü.jpg")
    member = zipfile.ZipInfo("x.jpg")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(member, b"x")
    data = (tmp_path / "x.zip").read_bytes()
    utf8 = decomposed.encode()
    fixed = data.replace(b"x.jpg", utf8).replace(b"\x05\x00\x00\x00", bytes([len(utf8)]) + b"\0\0\0")
    (tmp_path / "y.zip").write_bytes(_resized(fixed, len(utf8) - 5))
    assert list(open_tree(str(tmp_path / "y.zip")).entries) == ["ü.jpg"]


def _resized(data: bytes, more: int) -> bytes:
    """The zip with the offset of its directory, in its last record, moved by the longer name before it."""
    at = data.rindex(b"PK\5\6")
    size, offset = (int.from_bytes(data[at + place : at + place + 4], "little") for place in (12, 16))
    record = data[at : at + 12] + (size + more).to_bytes(4, "little") + (offset + more).to_bytes(4, "little")
    return data[:at] + record + data[at + 20 :]


def test_open_tree_follows_links_of_a_folder_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", "train/a.jpg")
    elsewhere = write_folder(tmp_path / "other", "b.jpg")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    assert list(open_tree(str(folder)).entries) == ["linked/b.jpg", "train/a.jpg"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("train2017", "train"),
        ("obj_train_data", "train"),
        ("valid", "val"),
        ("Validation", "val"),
        ("images_val", "val"),
        ("test", "test"),
        ("test_images", "test"),
        ("trainval", None),
        ("train-station", None),
        ("latest", None),
        ("", None),
    ],
)
def test_split_of_folder_name(name: str, split: str | None) -> None:
    assert split_of(name) == split
    assert split_of_path(f"val/images/{name}/x.jpg") == (split or "val")
    assert split_of_path(f"{name}.jpg") is None


def test_open_tree_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "set", "train/a.jpg", "val/b.jpg")
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("val"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(AnnotationError, match=r"set/val: Permission denied"):
        open_tree(str(folder))
