"""`verify` accepts a good folder and names the faults of a bad one, by shard and sample."""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.data import write_shards
from support.shards import reseal

from pipeline.data.index import SAMPLES, load_index
from pipeline.data.sharding import verify
from pipeline.data.sharding.summary import SUMMARY
from pipeline.data.sharding.verify import verify_shards
from pipeline.errors import ShardError


def rewrite(folder: Path, change: Callable[[tarfile.TarFile, tarfile.TarFile], None], mode: str = "w:") -> None:
    """Rewrite the first shard with `change(old, new)` and update the index, as an attacker would."""
    index = load_index(str(folder))
    path, buffer = folder / index.shards[0].name, io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode=mode, format=tarfile.USTAR_FORMAT) as new:
        change(old, new)
    path.write_bytes(buffer.getvalue())
    reseal(folder)


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


def test_verify_good_folder_has_no_faults(tmp_path: Path) -> None:
    import fsspec

    folder = write_shards(tmp_path).folder
    assert verify_shards(folder) == []
    fsspec.filesystem("memory").put(f"{folder}/", "/verify-test/", recursive=True)
    assert verify_shards("memory://verify-test") == []


def test_verify_rewritten_tar_has_no_faults(tmp_path: Path) -> None:
    folder = Path(write_shards(tmp_path).folder)
    rewrite(folder, copy)
    assert verify_shards(str(folder)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add("000000000003.pkl"), "foreign member '000000000003.pkl' (file) at byte"),
        (add("000000000003.jpg.gz"), "foreign member '000000000003.jpg.gz'"),
        (add("000000000003.JPG"), "foreign member '000000000003.JPG'"),
        (add("../000000000003.jpg"), "foreign member '../000000000003.jpg'"),
        (add("x/../../evil"), "foreign member"),
        (add("/etc/000000000003.jpg"), "foreign member '/etc/000000000003.jpg'"),
        (add("000000000999.jpg", tarfile.SYMTYPE, 0), "foreign member '000000000999.jpg' (symbolic link)"),
        (add("000000000999.jpg", tarfile.LNKTYPE, 0), "foreign member '000000000999.jpg' (hard link)"),
        (add("000000000999.jpg", tarfile.FIFOTYPE, 0), "foreign member '000000000999.jpg' (pipe)"),
        (add("000000000999.jpg", tarfile.CHRTYPE, 0), "foreign member '000000000999.jpg' (device)"),
        (add("000000000999.jpg", tarfile.DIRTYPE, 0), "foreign member '000000000999.jpg' (folder)"),
        (add("000000000999.jpg", tarfile.GNUTYPE_SPARSE), "foreign member '000000000999.jpg' (sparse file)"),
        (add("pax", tarfile.XHDTYPE), "foreign member 'pax' (PAX header)"),
        (add("pax", tarfile.XGLTYPE), "foreign member 'pax' (global PAX header)"),
        (add("././@LongLink", tarfile.GNUTYPE_LONGNAME), "foreign member '././@LongLink' (long name)"),
        (add("000000000999.jpg"), "000000000999.jpg (3 bytes at"),
        (add("000000000003.jpg"), "000000000003.jpg (3 bytes at"),  # twice
        (add("n" * 99 + "/000000000999.jpg"), "foreign member"),  # a prefix in the header
        (lambda old, new: None, "ends before 000000000003.jpg"),
        (
            lambda old, new: [new.addfile(m, old.extractfile(m)) for m in old.getmembers()[:-1]],
            "before 000000000031.json",
        ),
        (
            lambda old, new: [new.addfile(m, old.extractfile(m)) for m in old.getmembers()[1:]],
            "member 0 is 000000000003.j",
        ),
        (
            lambda old, new: [new.addfile(m, old.extractfile(m)) for m in old.getmembers()[::-1]],
            "member 0 is 000000000031",
        ),
    ],
)
def test_verify_foreign_member_is_found(
    tmp_path: Path, change: Callable[[tarfile.TarFile, tarfile.TarFile], None], message: str
) -> None:
    folder = Path(write_shards(tmp_path).folder)
    rewrite(folder, change)
    (fault,) = verify_shards(str(folder))
    assert message in fault
    assert "000000.tar" in fault


def test_verify_oversized_member_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path).folder
    monkeypatch.setattr(verify, "MAX_BYTES", 700)
    faults = verify_shards(folder)
    assert [fault.partition(": ")[2].split()[0] for fault in faults] == [
        f"0000000000{k}.jpg" for k in ("03", "38", "73")
    ]
    assert all("over the cap 700" in fault for fault in faults)


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_verify_compressed_tar_is_found(tmp_path: Path, mode: str) -> None:
    folder = Path(write_shards(tmp_path).folder)
    rewrite(folder, copy, mode)
    (fault,) = verify_shards(str(folder))
    assert "000000.tar has no tar header at byte 0" in fault


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (b"77777777777\0", "claims 8,589,934,591 bytes"),
        (b"\xff" * 10 + b"\xfc\0", "claims -1,024 bytes"),
        (b"\x80" + b"\x7f" * 11, "states wrong sizes: '000000000003.jpg' at byte 0"),
    ],
)
def test_verify_wrong_size_in_header_is_found(tmp_path: Path, size: bytes, message: str) -> None:
    folder = Path(write_shards(tmp_path).folder)
    path = folder / load_index(str(folder)).shards[0].name
    header = bytearray(path.read_bytes())
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header[:512]):06o}\0 ".encode()
    path.write_bytes(header)
    reseal(folder)
    (fault,) = verify_shards(str(folder))
    assert "000000.tar is truncated or states wrong sizes" in fault
    assert message in fault


@pytest.mark.parametrize("cut", [512, 1024, 10240])
def test_verify_truncated_tar_is_found(tmp_path: Path, cut: int) -> None:
    index = write_shards(tmp_path)
    path = Path(index.folder) / index.shards[1].name
    os.truncate(path, path.stat().st_size - cut)
    (fault,) = verify_shards(index.folder)
    assert path.name in fault
    assert "its index says" in fault
    reseal(Path(index.folder))
    assert bool(verify_shards(index.folder)) == (cut > 1024), "blocks of zeros after the end may be missing"


def test_verify_flipped_bit_is_found(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    path = Path(index.folder) / index.shards[0].name
    data = bytearray(path.read_bytes())
    data[-1] = 1
    path.write_bytes(data)
    assert verify_shards(index.folder) == [
        f"{path} does not have the sha256 of its index; copy it again or rebuild",
        f"{path} has data after its end",
    ]


def test_verify_missing_or_foreign_file_is_found(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    folder = Path(index.folder)
    (folder / index.shards[2].name).unlink()
    (folder / "extra.tar").write_bytes(b"")
    found = verify_shards(index.folder)
    assert [("extra.tar" in found[0]), ("000002.tar: No such file" in found[1]), len(found)] == [True, True, 2]
    (folder / SAMPLES).write_bytes(b"x")
    assert "does not belong to its index" in verify_shards(index.folder)[0]
    with pytest.raises(ShardError, match=r"nowhere$"):
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
def test_verify_record_against_index_is_found(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    index = write_shards(tmp_path)
    path = Path(index.folder) / index.shards[0].name
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    reseal(Path(index.folder))
    (fault,) = verify_shards(index.folder)
    assert "000000000003" in fault
    assert message in fault


def test_verify_undecodable_image_is_found(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    path = Path(index.folder) / index.shards[0].name
    data, offset, length = path.read_bytes(), int(index.samples.offset[0]), int(index.samples.length[0])
    path.write_bytes(data[: offset + length // 2] + bytes(length - length // 2) + data[offset + length :])
    reseal(Path(index.folder))
    faults = verify_shards(index.folder)
    assert len(faults) == 1
    assert "000000000003" in faults[0]


def test_verify_shows_all_faults_of_all_tars(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    for shard in (0, 2):
        path = Path(index.folder) / index.shards[shard].name
        path.write_bytes(path.read_bytes().replace(b'"bbox":', b'"bbix":'))
    reseal(Path(index.folder))
    faults = verify_shards(index.folder)
    assert len(faults) == 4 + 2
    assert all("malformed annotation record (KeyError('bbox'))" in fault for fault in faults)


@pytest.mark.parametrize(
    ("text", "fault"),
    [(b"", "missing"), (b"{}", "does not match"), (b"another", "does not match"), (b"empty", "does not")],
)
def test_verify_wrong_summary_is_found(tmp_path: Path, text: bytes, fault: str) -> None:
    index = write_shards(tmp_path)
    path = Path(index.folder) / SUMMARY
    if fault == "missing":
        path.unlink()
        assert verify_shards(index.folder) == [], "it can be derived"
        return
    document = json.loads(path.read_text())
    if text == b"another":
        text = json.dumps(document | {"dataset": "0" * 64}).encode()
    elif text == b"empty":
        text = json.dumps(document | {"empty": 3}).encode()
    path.write_bytes(text)
    (found,) = verify_shards(index.folder)
    assert f"{path} does not match the shards; delete it" in found


def test_verify_damaged_remote_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    index, store = write_shards(tmp_path), fsspec.filesystem("memory")
    store.put(f"{index.folder}/", "/verify-damaged/", recursive=True)
    name = f"/verify-damaged/{index.shards[1].name}"
    data = bytearray(store.cat_file(name))
    data[600] ^= 1
    store.pipe_file(name, bytes(data))
    store.rm_file(f"/verify-damaged/{index.shards[2].name}")
    changed, gone = verify_shards("memory://verify-damaged")
    assert f"verify-damaged/{index.shards[1].name} does not have the sha256 of its index; copy it again" in changed
    assert f"cannot read memory://verify-damaged/{index.shards[2].name}" in gone
    assert list((tmp_path / "temporary").iterdir()) == []
