"""Headers that would move, hide, repeat or inflate data are refused with their position."""

import io
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sharding.tars import BLOCK, MAX_EXTENSION, Member, padded_size, resolve_names, walk_headers
from pipeline.errors import ShardError


def tar(*members: tuple[str, bytes], form: int = tarfile.USTAR_FORMAT, **fields: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def members(data: bytes) -> list[Member]:
    return list(walk_headers(lambda offset, length: data[offset : offset + length], len(data), "x.tar"))


def files(data: bytes) -> dict[str, bytes]:
    def read(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    return {
        m.name: read(m.offset, m.length) for m in resolve_names(walk_headers(read, len(data), "x.tar"), read, "x.tar")
    }


def patched(data: bytes, change: Callable[[bytearray], None], at: int = 0) -> bytes:
    """The tar with a changed header at `at` and a corrected checksum, as an attacker would write it."""
    header = bytearray(data[at : at + BLOCK])
    change(header)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return data[:at] + bytes(header) + data[at + BLOCK :]


NAMES = st.text(st.characters(blacklist_characters="\0/", blacklist_categories=["Cs"]), min_size=1, max_size=150)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(NAMES, st.binary(max_size=1200), max_size=4),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_walk_headers_names_equal_tarfile(content: dict[str, bytes], form: int) -> None:
    data = tar(*content.items(), form=form, mtime=1.5)
    assert files(data) == content


@given(st.integers(0, 10**7))
def test_padded_size_equals_tarfile(length: int) -> None:
    header = len(tarfile.TarInfo("x").tobuf())
    assert padded_size(length) == header + (length + 511) // 512 * 512


@pytest.mark.parametrize("blocks", range(1, 9))
def test_walk_headers_cut_on_block_boundary_raises(blocks: int) -> None:
    data = tar(("a.jpg", b"x" * 600), ("b.jpg", b"y" * 100), ("c.jpg", b""))
    assert len(members(data)) == 3
    end = 3 * BLOCK + 2 * BLOCK + BLOCK  # headers, then the data of a and b
    with pytest.raises(ShardError, match=r"^x\.tar "):
        members(data[: min(blocks * BLOCK, end)])


def test_member_special_file_is_not_plain() -> None:
    kinds = {
        tarfile.SYMTYPE: "symbolic link",
        tarfile.LNKTYPE: "hard link",
        tarfile.CHRTYPE: "device",
        tarfile.FIFOTYPE: "pipe",
        tarfile.DIRTYPE: "folder",
        tarfile.GNUTYPE_SPARSE: "sparse file",
        tarfile.CONTTYPE: "type b'7'",
        b"Z": "type b'Z'",
    }
    for kind, what in kinds.items():
        (member,) = members(tar(("a.jpg", b""), type=kind, linkname="/etc/passwd"))
        assert (member.plain, member.what) == (False, what)
    (old,) = members(tar(("a.jpg", b"x"), type=tarfile.AREGTYPE))
    assert (old.plain, old.what) == (True, "file")


GOOD = tar(("a.jpg", b"x" * 600))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "end-of-archive"),
        (GOOD[:-1] + b"x", "after its end"),
        (GOOD + GOOD, "after its end"),
        (b"x" * 1024, "header at byte 0"),
        (patched(GOOD, lambda h: h.__setitem__(slice(124, 136), b"77777777777\0")), "8,589,934,591 bytes"),
        (patched(GOOD, lambda h: h.__setitem__(slice(124, 136), b"\xff" * 10 + b"\xfc\x00")), "-1,024 bytes"),
        (patched(GOOD, lambda h: h.__setitem__(slice(124, 136), b"\x80" + b"\xff" * 11)), "a\\.jpg"),
        (patched(GOOD, lambda h: h.__setitem__(slice(124, 136), b"zzzzzzzzzzz\0")), "header at byte 0"),
        (bytes([GOOD[0] ^ 1]) + GOOD[1:], "checksum"),
    ],
)
def test_walk_headers_damaged_header_raises(data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=rf"^x\.tar .*{message}"):
        members(data)


def extended(kind: bytes, data: bytes) -> bytes:
    return tar(("pax", data), type=kind)[: padded_size(len(data))] + GOOD


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (extended(tarfile.XHDTYPE, b"14 size=99999\n"), "'size'"),
        (extended(tarfile.XGLTYPE, b"14 size=99999\n"), "'size'"),
        (extended(tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n"), "'GNU.sparse.major'"),
        (extended(tarfile.XHDTYPE, b"99 path=x\n"), "PAX header at byte 0"),
        (extended(tarfile.XHDTYPE, b"0 path=x\n"), "PAX header at byte 0"),
        (extended(tarfile.XHDTYPE, b"-5 path=x\n"), "PAX header at byte 0"),
        (extended(tarfile.XHDTYPE, b"9" * 5000), "PAX header at byte 0"),
        (extended(tarfile.XHDTYPE, bytes(MAX_EXTENSION + 1)), "65,537 bytes at byte 0"),
        (extended(tarfile.GNUTYPE_LONGNAME, b"n" * (MAX_EXTENSION + 1)), "65,537"),
    ],
)
def test_resolve_names_dangerous_extension_header_raises(data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=rf"^x\.tar .*{message}"):
        files(data)


def test_resolve_names_extension_header_names_member() -> None:
    assert files(extended(tarfile.XHDTYPE, b"18 path=b/ccc.jpg\n")) == {"b/ccc.jpg": b"x" * 600}
    assert files(extended(tarfile.XGLTYPE, b"13 comment=x\n")) == {"a.jpg": b"x" * 600}
    assert [m.kind for m in members(extended(tarfile.XHDTYPE, b"12 path=b/c\n"))] == [tarfile.XHDTYPE, tarfile.REGTYPE]
