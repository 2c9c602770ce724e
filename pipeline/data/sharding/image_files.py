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
        raise ShardError("does not have the checksum that its zip lists: it is damaged")
    return data


def _unzip(opened: BinaryIO, file: ImageFile, packed: int, most: int) -> bytes:
    """Read at most `most` bytes of the zip member whose header is next, plus one byte if it is longer.

    `zipfile` would read the whole directory (half a second for COCO's) in every process, for every shard.
    """
    header = opened.read(ZIP_HEADER.size)
    if len(header) < ZIP_HEADER.size or not header.startswith(ZIP_MEMBER):
        raise ShardError("has no header where the directory of its zip says: the zip is damaged")
    opened.seek(sum(ZIP_HEADER.unpack(header)), os.SEEK_CUR)
    if not file.deflated:
        return opened.read(min(packed, most + 1))
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(opened.read(packed), most + 1)
