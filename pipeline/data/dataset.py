"""Random access to the samples of a shard folder: the raw annotations, and the image with its training targets.

A sample is read at the index's offsets. Each member is compared with its tar header, which detects a shard of another
build. An image is rotated by the orientation in its record. Annotations stay in the shards until their sample is read,
so no process keeps them in memory. Nothing is unpickled, unpacked or guessed from file names. Every fault is a
ShardError that names shard and sample.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.cache import ShardCache
from pipeline.data.images import MAX_BYTES, decode_at_least
from pipeline.data.index import LabelMode, load_index
from pipeline.data.reader import ShardReader
from pipeline.data.records import usable_boxes
from pipeline.data.shared_memory import share
from pipeline.errors import ShardError
from pipeline.files.shard_files import Store

HEADER = 512  # bytes of the tar header before each member
MAX_RECORD_BYTES = 16 * 2**20  # COCO's largest is 50 KB, and parsing takes ten times the memory
REGULAR = (b"0", b"\0")  # type flags of a plain file
Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Sample:
    """One image with its training targets: no crowd regions, boxes clamped to the image, none without area."""

    image_id: int
    size: Size  # of the original, after rotation
    image: Image.Image  # RGB, rotated by the record's orientation, 1/shrink of the original size
    shrink: int
    boxes_xyxy: NDArray[np.float32]  # [n, 4] pixels of the original
    labels: NDArray[np.int64]  # [n]


class DetectionDataset:
    """The samples of one shard folder (local or fsspec URL) by position in its index. Picklable; keeps no decoded data.

    Args:
        folder: written by `jobs.shard build`.
        labels: see `ShardIndex.labels`.
        cache: keeps shards of a URL; None reads each sample over the network.

    Raises:
        ShardError: on opening, see `index.load_index`; on reading, a damaged shard or image.
    """

    def __init__(self, folder: str, labels: LabelMode = "contiguous", cache: ShardCache | None = None) -> None:
        self.index = load_index(folder)
        self.reader = ShardReader(Store(folder), cache)
        self._labels = self.index.labels(labels)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for data sets with the same samples at the same address."""
        return self.index.folder, self.index.digest, tuple(self._labels.items())

    def size(self, i: int) -> Size:
        """Original (height, width) of sample i, after rotation; reads nothing."""
        return int(self.index.samples.height[i]), int(self.index.samples.width[i])

    def shared(self) -> Self:
        """The same data set with the index's columns in memory that child processes share."""
        copied = type(self).__new__(type(self))
        copied.index = dataclasses.replace(self.index, samples=share(self.index.samples))
        copied.reader = ShardReader(self.reader.store, self.reader.cache)
        copied._labels = self._labels
        return copied

    def read_image(self, i: int) -> bytes:
        """The image file of sample i, unchanged."""
        return self._members(i, image=True, record=False)[0]

    def read_annotations(self, i: int) -> dict[str, Any]:
        """The raw record: image_id, width, height, and `annotations` (crowd included) as in the COCO file.

        An image whose EXIF orientation must be applied also has `orientation`, 2 to 8; the other fields then describe
        the displayed image.
        """
        return self._parse(i, self._members(i, image=False, record=True)[1])

    def sample(self, i: int, at_least: Size | None = None) -> Sample:
        """Decode sample i; with `at_least` (h, w) a JPEG may be decoded smaller, but not below that size."""
        data, text = self._members(i, image=True, record=True)
        record = self._parse(i, text)
        size = (record["height"], record["width"])
        try:
            image, shrink = decode_at_least(data, size, size if at_least is None else at_least, orientation_of(record))
        except ShardError as error:
            raise self.fault(i, str(error)) from None
        boxes, labels = self._targets(i, record)
        if len(boxes) != self.index.samples.boxes[i]:
            raise self.fault(i, f"has {len(boxes)} boxes, the index says {self.index.samples.boxes[i]}")
        return Sample(record["image_id"], size, image, shrink, boxes, labels)

    def read_targets(self, i: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """`boxes_xyxy` and `labels` of sample i as in `Sample`; the image is not read."""
        return self._targets(i, self.read_annotations(i))

    def _targets(self, i: int, record: dict[str, Any]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        try:
            boxes, categories = usable_boxes(record["annotations"], self.size(i))
            return boxes, np.array([self._labels[category] for category in categories], np.int64)
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise self.fault(i, f"has a malformed annotation ({error!r})") from None

    def _parse(self, i: int, text: bytes) -> dict[str, Any]:
        samples = self.index.samples
        try:
            record: dict[str, Any] = _RECORDS.decode(text.decode())
            found = (record["image_id"], record["width"], record["height"])
            orientation_of(record)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self.fault(i, f"has no annotation record ({error!r})") from None
        if found != (samples.image_id[i], samples.width[i], samples.height[i]):
            raise self.fault(i, f"has an annotation record of another image {found}")
        return record

    def _members(self, i: int, image: bool, record: bool) -> tuple[bytes, bytes]:
        """Read the requested members, in one read if they are neighbours."""
        samples = self.index.samples
        kind = "png" if samples.png[i] else "jpg"
        wanted = {}
        if image:
            wanted[kind] = (int(samples.offset[i]), int(samples.length[i]), MAX_BYTES)
        if record:
            wanted["json"] = (int(samples.json_offset[i]), int(samples.json_length[i]), MAX_RECORD_BYTES)
        shard = self.index.shards[int(samples.shard[i])]
        for name, (offset, length, cap) in wanted.items():
            if not 0 < length <= cap or not HEADER <= offset <= shard.bytes - length:
                raise self.fault(i, f"has an impossible length {length:,} or offset {offset:,} of its {name}")
        start = min(offset for offset, _, _ in wanted.values()) - HEADER
        end = max(offset + length for offset, length, _ in wanted.values())
        together = end - start <= sum(length + 2 * HEADER for _, length, _ in wanted.values())  # headers and padding
        try:
            if together:
                block = memoryview(self.reader.read(shard, start, end - start))
                blocks = {name: block[at - start - HEADER : at - start + n] for name, (at, n, _) in wanted.items()}
            else:
                parts = {name: self.reader.read(shard, at - HEADER, n + HEADER) for name, (at, n, _) in wanted.items()}
                blocks = {name: memoryview(part) for name, part in parts.items()}
        except ShardError as error:
            raise ShardError(f"{error} (for sample {samples.image_id[i]:012d})") from None
        contents = {name: self._content(i, name, data) for name, data in blocks.items()}
        return contents.get(kind, b""), contents.get("json", b"")

    def _content(self, i: int, kind: str, block: memoryview) -> bytes:
        """A member's bytes; raises ShardError if its header is not the expected one."""
        header = bytes(block[:HEADER])
        expected = f"{self.index.samples.image_id[i]:012d}.{kind}".encode()
        if header[:100].rstrip(b"\0") != expected or header[345:346] not in (b"", b"\0"):
            raise self.fault(i, f"is not where the index says (no {expected.decode()} there)")
        if header[156:157] not in REGULAR:
            raise self.fault(i, f"is not a plain file in its tar (type {header[156:157]!r})")
        length = len(block) - HEADER
        if header[124:136].rstrip(b" \0") != b"%011o" % length:
            raise self.fault(i, f"has another length in its tar than in the index ({length:,})")
        return bytes(block[HEADER:])

    def fault(self, i: int, what: str) -> ShardError:
        """The error that says what is wrong with sample i."""
        shard = self.index.shards[int(self.index.samples.shard[i])].name
        return ShardError(
            f"{self.reader.store.path(shard)}: sample {self.index.samples.image_id[i]:012d} {what}; "
            f"run `python -m jobs.shard verify {self.index.folder}`"
        )


def orientation_of(record: dict[str, Any]) -> int:
    """The EXIF orientation to apply, 1 if the record has none. Raises ValueError for a value that is not valid."""
    orientation = record.get("orientation", 1)
    if type(orientation) is not int or not 1 <= orientation <= 8:
        raise ValueError(f"{orientation!r:.30} is not an EXIF orientation")
    return orientation


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not valid as a number of an annotation")


_RECORDS = json.JSONDecoder(parse_constant=_refuse)  # `json.loads` would create a decoder for each sample
