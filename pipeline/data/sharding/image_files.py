"""The position of one image's bytes: a file, or a range of a tar or zip. No process needs an archive's directory.

Nothing is extracted. No more is read or inflated than the archive's directory states and `images.MAX_BYTES` allows.
Faults are ShardErrors without the image's name.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.errors import ShardError

WRONG_CHECKSUM = "does not have the checksum that its zip lists: it is damaged"
STREAM_BYTES = 2**20  # per read of packed bytes
ZIP_MEMBER = b"PK\3\4"
ZIP_HEADER = struct.Struct("<26xHH")  # before a member; ends with the lengths of its name and extra field


@dataclass(frozen=True)
class ImageFile:
    """The position of one image's bytes."""

    path: str
    length: int
    stamp: int  # differs for different content: time of the file, checksum of a zip's member
    offset: int = 0
    packed: int | None = None  # compressed bytes in a zip, where `offset` is the header's; None outside of zips
    deflated: bool = False
    as_png: int | None = None  # bytes as PNG, for an image that is stored as one; see `converted`

    @property
    def stored_length(self) -> int:
        """Bytes in a shard."""
        return self.length if self.as_png is None else self.as_png


def read_image_file(file: ImageFile, count: int | None = None) -> bytes:
    """Read the image, or at most its first `count` bytes. Raises ShardError if it is missing, shorter or damaged."""
    most = file.length if count is None else min(count, file.length)
    try:
        with open(file.path, "rb") as opened:
            opened.seek(file.offset)
            data = opened.read(most) if file.packed is None else _unzip(opened, file, file.packed, most)
    except OSError as error:
        raise ShardError(f"cannot be read: {error.strerror} (every node must see {file.path})") from None
    except zlib.error as error:
        raise ShardError(f"is damaged in its zip: {error}") from None
    if count is None and len(data) != file.length:
        raise ShardError(f"has {len(data):,} bytes or more, not the {file.length:,} that were listed")
    if count is None and file.packed is not None and zlib.crc32(data) != file.stamp:
        raise ShardError(WRONG_CHECKSUM)
    return data


class FileStream:
    """Reads a file or member from its start, in pieces; what a zip holds is inflated on the way."""

    def __init__(self, file: ImageFile) -> None:
        """Raises ShardError if a zip is damaged, OSError if the file cannot be read."""
        self._file = open(file.path, "rb")  # noqa: SIM115  # closed by `close`
        self._of, self._left, self._sum = file, file.length, 0
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if file.deflated else None
        self._file.seek(file.offset)
        if file.packed is not None:
            _skip_header(self._file)
        self._packed = file.length if file.packed is None else file.packed

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end. Raises ShardError: damaged, or another length than was listed."""
        parts, missing = [], min(count, self._left)
        while missing:
            part = self._next(missing)
            if not part:
                raise ShardError(f"ends {self._left:,} bytes before the length that was listed")
            parts.append(part)
            missing -= len(part)
            self._left -= len(part)
            self._sum = zlib.crc32(part, self._sum)
        if count and not self._left and self._of.packed is not None and self._sum != self._of.stamp:
            raise ShardError(WRONG_CHECKSUM)
        return b"".join(parts)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next(self, most: int) -> bytes:
        if self._inflate is None:
            return self._file.read(most)
        try:
            while True:
                packed = self._inflate.unconsumed_tail
                if not packed:
                    packed = self._file.read(min(self._packed, STREAM_BYTES))
                    self._packed -= len(packed)
                data = self._inflate.decompress(packed, most)
                if data or not packed or self._inflate.eof:
                    return data
        except zlib.error as error:
            raise ShardError(f"is damaged in its zip: {error}") from None


def _unzip(opened: BinaryIO, file: ImageFile, packed: int, most: int) -> bytes:
    """Read at most `most` bytes of the zip member whose header is next, plus one byte if it is longer.

    `zipfile` would read the whole directory (half a second for COCO's) in every process, for every shard.
    """
    _skip_header(opened)
    if not file.deflated:
        return opened.read(min(packed, most + 1))
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(opened.read(packed), most + 1)


def _skip_header(file: BinaryIO) -> None:
    """Skip the header of a zip's member, which is next."""
    header = file.read(ZIP_HEADER.size)
    if len(header) < ZIP_HEADER.size or not header.startswith(ZIP_MEMBER):
        raise ShardError("has no header where the directory of its zip says: the zip is damaged")
    file.seek(sum(ZIP_HEADER.unpack(header)), os.SEEK_CUR)
