"""Walking the headers of a plain tar that nobody vouches for: where each member lies. Nothing is unpacked or skipped.

Used by `verify`, which lets only our own members through, and by `sources`, for pictures that come in tars. Each header
counts where it stands: no extension header may change a size, no sparse file is expanded, no link is followed. Faults
are `ShardError`s that name the tar and the place.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pipeline.errors import ShardError

BLOCK = 512  # tar's unit: a header, and what members are padded to
CHUNK = 2**20  # bytes read at a time where all must be zero
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
    """One header of a tar, and where its data lies."""

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


def walk(read: Read, size: int, where: str) -> Iterator[Member]:
    """Every header of a tar of `size` bytes, extension headers as well, in their order.

    Raises:
        ShardError: no header where one must be, a member beyond the end, no end-of-archive block, data after it.
    """
    offset = 0
    while offset + BLOCK <= size:
        block = read(offset, BLOCK)
        if not any(block):
            rest = range(offset, size, CHUNK)
            if any(read(at, min(CHUNK, size - at)).strip(b"\0") for at in rest):
                raise ShardError(f"{where} has data after its end")
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise ShardError(f"{where} has no tar header at byte {offset:,}: {error}") from None
        member = Member(header.name, header.type, offset + BLOCK, header.size)
        if header.size < 0 or member.offset + header.size > size:
            raise ShardError(
                f"{where} is truncated or lies about sizes: {header.name!r:.120} at byte {offset:,} "
                f"claims {header.size:,} bytes of {size:,}"
            )
        yield member
        offset += stored(header.size)
    raise ShardError(f"{where} ends without the end-of-archive blocks: it is truncated")


def named(members: Iterator[Member], read: Read, where: str) -> Iterator[Member]:
    """Members with the long or non-ASCII names that extension headers (PAX, GNU) give them; those headers are left out.

    Raises:
        ShardError: as `walk`; a huge extension header, or one that would change where data lies.
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


def stored(length: int) -> int:
    """Bytes that a member of `length` bytes takes: its header, and its data in whole blocks."""
    return BLOCK + -(-length // BLOCK) * BLOCK
