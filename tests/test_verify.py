"""`verify` proves a good folder and names what is wrong with a bad one; `diff` says how two differ."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers_data import contents, edit, picture, write_coco, write_shards

from pipeline.data import verify
from pipeline.data.index import INDEX, SAMPLES, ShardInfo, dataset_digest, load_index
from pipeline.data.shards import build_shards
from pipeline.data.verify import describe, diff_shards, verify_shards
from pipeline.errors import ShardError


def rewrite(folder: Path, change: Callable[[tarfile.TarFile, tarfile.TarFile], None], mode: str = "w:") -> None:
    """Write the first shard anew by `change(old, new)` and make the index vouch for it, as an attacker would."""
    index = load_index(str(folder))
    path, buffer = folder / index.shards[0].name, io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode=mode, format=tarfile.USTAR_FORMAT) as new:
        change(old, new)
    path.write_bytes(buffer.getvalue())
    reseal(folder)


def reseal(folder: Path) -> None:
    index, document = load_index(str(folder)), json.loads((folder / INDEX).read_text())
    shards = []
    for info in index.shards:
        data = (folder / info.name).read_bytes()
        shards.append(ShardInfo(info.name, len(data), hashlib.sha256(data).hexdigest(), info.samples))
    document["shards"] = [vars(shard) for shard in shards]
    document["digest"] = dataset_digest(index.categories, tuple(shards))
    (folder / INDEX).write_text(json.dumps(document))


def copy(old: tarfile.TarFile, new: tarfile.TarFile) -> None:
    for member in old:
        new.addfile(member, old.extractfile(member))


def add(name: str, kind: bytes = tarfile.REGTYPE, size: int = 3) -> Callable[[tarfile.TarFile, tarfile.TarFile], None]:
    def change(old: tarfile.TarFile, new: tarfile.TarFile) -> None:
        copy(old, new)
        member = tarfile.TarInfo(name)
        member.type, member.size, member.linkname = kind, size, "/etc/passwd"
        new.addfile(member, io.BytesIO(bytes(size)))

    return change


def test_a_good_folder(tmp_path: Path) -> None:
    import fsspec

    folder = write_shards(tmp_path).folder
    assert verify_shards(folder) == []
    fsspec.filesystem("memory").put(f"{folder}/", "/verify-test/", recursive=True)
    assert verify_shards("memory://verify-test") == []


def test_rewriting_without_a_change_is_still_good(tmp_path: Path) -> None:
    folder = Path(write_shards(tmp_path).folder)
    rewrite(folder, copy)
    assert verify_shards(str(folder)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add("000000000003.pkl"), "foreign member '000000000003.pkl'"),
        (add("../000000000003.jpg"), "foreign member '../000000000003.jpg'"),
        (add("x/../../evil"), "foreign member"),
        (add("000000000999.jpg", tarfile.SYMTYPE, 0), "foreign member '000000000999.jpg'"),
        (add("000000000999.jpg", tarfile.LNKTYPE, 0), "foreign member"),
        (add("000000000999.jpg"), "member 10 is .*999.jpg.* the index says None"),
        (add("n" * 99 + "/000000000999.jpg"), "foreign member"),  # a prefix in the header
        (lambda old, new: None, "member 0 is None"),
        (lambda old, new: [new.addfile(m, old.extractfile(m)) for m in old.getmembers()[::-1]], "member 0 is"),
    ],
)
def test_members_that_do_not_belong(
    tmp_path: Path, change: Callable[[tarfile.TarFile, tarfile.TarFile], None], message: str
) -> None:
    folder = Path(write_shards(tmp_path).folder)
    rewrite(folder, change)
    (fault,) = verify_shards(str(folder))
    assert message.split(".*")[0] in fault
    assert "000000.tar" in fault


def test_oversized_members_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path).folder
    monkeypatch.setattr(verify, "MAX_BYTES", 700)
    faults = verify_shards(folder)
    assert len(faults) == 3
    assert all("over the cap 700" in fault for fault in faults)


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_compressed_tars_are_refused(tmp_path: Path, mode: str) -> None:
    folder = Path(write_shards(tmp_path).folder)
    rewrite(folder, copy, mode)
    (fault,) = verify_shards(str(folder))
    assert "has no tar header at byte 0" in fault


@pytest.mark.parametrize("cut", [512, 1024, 10240])
def test_truncated_on_a_block_boundary(tmp_path: Path, cut: int) -> None:
    index = write_shards(tmp_path)
    path = Path(index.folder) / index.shards[1].name
    os.truncate(path, path.stat().st_size - cut)
    (fault,) = verify_shards(index.folder)
    assert path.name in fault
    assert "its index says" in fault
    reseal(Path(index.folder))
    assert bool(verify_shards(index.folder)) == (cut > 1024), "blocks of zeros after the end may be missing"


def test_bit_rot(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    path = Path(index.folder) / index.shards[0].name
    data = bytearray(path.read_bytes())
    data[-1] = 1
    path.write_bytes(data)
    assert verify_shards(index.folder) == [
        f"{path} does not have the sha256 of its index; copy it again or rebuild",
        f"{path} has data after its end",
    ]


def test_missing_foreign_and_unreadable_files(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    folder = Path(index.folder)
    (folder / index.shards[2].name).unlink()
    (folder / "extra.tar").write_bytes(b"")
    found = verify_shards(index.folder)
    assert [("extra.tar" in found[0]), ("000002.tar: No such file" in found[1]), len(found)] == [True, True, 2]
    (folder / SAMPLES).write_bytes(b"x")
    assert "does not belong to its index" in verify_shards(index.folder)[0]
    with pytest.raises(ShardError, match="there is no shard folder"):
        verify_shards(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"image_id":3,', b'"image_id":4,', "annotation record of another image"),
        (b'"iscrowd":1', b'"iscrowd":0', "has 3 boxes and 0 crowds"),
        (b'"category_id":13', b'"category_id":12', "category that the index does not know"),
        (b'"bbox":', b'"bbix":', "malformed annotation"),
    ],
)
def test_records_that_contradict_the_index(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    index = write_shards(tmp_path)
    path = Path(index.folder) / index.shards[0].name
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    reseal(Path(index.folder))
    (fault,) = verify_shards(index.folder)
    assert "000000000003" in fault
    assert message in fault


def test_a_picture_that_does_not_decode(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    path = Path(index.folder) / index.shards[0].name
    data, offset, length = path.read_bytes(), int(index.samples.offset[0]), int(index.samples.length[0])
    path.write_bytes(data[: offset + length // 2] + bytes(length - length // 2) + data[offset + length :])
    reseal(Path(index.folder))
    faults = verify_shards(index.folder)
    assert len(faults) == 1
    assert "000000000003" in faults[0]


def test_diff(tmp_path: Path) -> None:
    annotations, folder = write_coco(tmp_path)
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    build_shards(annotations, folder, a)
    build_shards(annotations, folder, b, samples_per_shard=5)
    assert diff_shards(a, a) == []
    assert diff_shards(a, b) == ["the same images, cut into 1 and 3 shards"]
    build_shards(annotations, folder, c, limit=5)
    assert diff_shards(a, c) == [f"7 images only in {a}: 38, 45, 52, 59, 66 ..."]
    tree = json.loads(annotations.read_text())
    tree["annotations"][0]["bbox"][0] += 1
    edit(annotations, {"annotations": tree["annotations"], "categories": [*tree["categories"], {"id": 2, "name": "x"}]})
    picture((48, 64), 99).save(folder / "some_3.jpg")
    build_shards(annotations, folder, d)
    assert diff_shards(a, d) == [
        "categories differ: 3 and 4",
        "1 images have different pictures: 3",
        "1 images have different annotations: 3",
    ]


def test_describe(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    lines = describe(index)
    assert len(lines) == 5
    assert "12, of which 1 without a box" in lines[1]
    assert "22, and 11 crowd regions" in lines[2]
    assert index.digest in lines[4]
    assert int(np.sum(index.samples.boxes)) == 22
    assert contents(Path(index.folder)), "describing changes nothing"
