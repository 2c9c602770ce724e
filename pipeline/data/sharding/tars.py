"""Reads the headers of a plain, untrusted tar: the position of each member. Nothing is unpacked or skipped.

`verify` accepts only our own members; `sources` reads images that come in tars. No extension header may change a
size, no sparse file is expanded, no link is followed. Faults are ShardErrors that name the tar and the position.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pipeline.errors import ShardError

BLOCK = 512  # tar's unit: size of a header; members are padded to it
READ_BYTES = 2**20  # per read of the zeros at the end
MAX_EXTENSION = 64 * 1024  # bytes of an extension header; a path has at most 4,096
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
KINDS = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.DIRTYPE: "folder",
    tarfile.FIFOTYPE: "pipe",
    tarfile.GNUTYPE_SPARSE: "sparse file",
    tarfile.GNUTYPE_LONGNAME: "long name",
    tarfile.GNUTYPE_LONGLINK: "long link",
    tarfile.XHDTYPE: "PAX header",
    tarfile.XGLTYPE: "global PAX header",
}
PAX, PAX_GLOBAL, LONG_NAME = tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME

Read = Callable[[int, int], bytes]  # (offset, length) -> as many bytes, or a ShardError


@dataclass(frozen=True)
class Member:
    """One header of a tar, and the position of its data."""

    name: str
    kind: bytes  # type flag
    offset: int
    length: int

    @property
    def plain(self) -> bool:
        """Whether this is an ordinary file: no link, device, folder, sparse file or extension header."""
        return self.kind in PLAIN

    @property
    def what(self) -> str:
        """The kind in words."""
        return "file" if self.plain else KINDS.get(self.kind, f"type {self.kind!r}")


def walk_headers(read: Read, size: int, where: str) -> Iterator[Member]:
    """Yield every header of a tar of `size` bytes in order, including extension headers.

    Raises:
        ShardError: a header is missing, a member exceeds the end, the end-of-archive block is missing, or data follows.
    """
    offset = 0
    while offset + BLOCK <= size:
        block = read(offset, BLOCK)
        if not any(block):
            rest = range(offset, size, READ_BYTES)
            if any(read(at, min(READ_BYTES, size - at)).strip(b"\0") for at in rest):
                raise ShardError(f"{where} has data after its end")
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise ShardError(f"{where} has no tar header at byte {offset:,}: {error}") from None
        member = Member(header.name, header.type, offset + BLOCK, header.size)
        if header.size < 0 or member.offset + header.size > size:
            raise ShardError(
                f"{where} is truncated or states wrong sizes: {header.name!r:.120} at byte {offset:,} "
                f"claims {header.size:,} bytes of {size:,}"
            )
        yield member
        offset += padded_size(header.size)
    raise ShardError(f"{where} ends without the end-of-archive blocks: it is truncated")


def resolve_names(members: Iterator[Member], read: Read, where: str) -> Iterator[Member]:
    """Yield members with the long or non-ASCII names of their extension headers (PAX, GNU), without those headers.

    Raises:
        ShardError: as `walk_headers`; an extension header is huge or would change the position of data.
    """
    name = None
    for member in members:
        if member.kind not in (PAX, PAX_GLOBAL, LONG_NAME):
            yield replace(member, name=name) if name is not None else member
            name = None
            continue
        if member.length > MAX_EXTENSION:
            raise ShardError(
                f"{where} has an extension header of {member.length:,} bytes at byte {member.offset - BLOCK:,}, "
                f"over the cap {MAX_EXTENSION:,}"
            )
        data = read(member.offset, member.length)
        if member.kind == LONG_NAME:
            name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            continue
        fields = _pax_fields(data, f"{where} has a PAX header at byte {member.offset - BLOCK:,} that")
        if member.kind == PAX:
            name = fields.get("path", name)


def _pax_fields(data: bytes, fault: str) -> dict[str, str]:
    """The `LENGTH KEY=VALUE` lines of a PAX header. Raises ShardError if one is broken or moves data."""
    fields = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        if not (digits.isdigit() and len(digits) < len(data) and len(digits) + 4 <= int(digits[:6]) <= len(data)):
            raise ShardError(f"{fault} is malformed")
        field, data = data[: int(digits)], data[int(digits) :]
        key, _, value = field[len(digits) + 1 : -1].decode("utf-8", "surrogateescape").partition("=")
        if key == "size" or key.startswith("GNU.sparse"):
            raise ShardError(f"{fault} sets {key!r}; pack plain files of their own size")
        fields[key] = value
    return fields


def padded_size(length: int) -> int:
    """Bytes of a member of `length` bytes in a tar: its header, and its data in whole blocks."""
    return BLOCK + -(-length // BLOCK) * BLOCK
