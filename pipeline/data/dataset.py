"""Random access to the samples of a shard folder: the raw annotations, and the picture with its training targets.

Used by `loader` (targets) and by evaluation (raw annotations, from which the COCO ground truth is rebuilt). A sample is
two reads at the index's offsets; a tar's size is compared when it is first touched, and each read is compared with the
tar header before it, so a shard of another build is noticed. Nothing is unpickled, unpacked or guessed from file names;
every fault is a `ShardError` that names shard and sample.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.annotations import usable_boxes
from pipeline.data.images import MAX_BYTES, decode
from pipeline.data.index import LabelMode, load_index
from pipeline.data.storage import Store
from pipeline.errors import ShardError

HEADER = 512  # bytes of a tar header, which stands before each member


@dataclass(frozen=True)
class Sample:
    """One image with what training learns from it: no crowd, boxes clamped to the image, none without area."""

    image_id: int
    image: Image.Image  # RGB, stored orientation
    boxes_xyxy: NDArray[np.float32]  # [n, 4] pixels
    labels: NDArray[np.int64]  # [n]


class DetectionDataset:
    """The samples of one shard folder (local or fsspec URL) by position in its index. Pickles; holds no decoded data.

    Raises:
        ShardError: on opening, see `index.load_index`; on reading, a damaged shard or picture.
    """

    def __init__(self, folder: str, labels: LabelMode = "contiguous") -> None:
        self.index = load_index(folder)
        self._labels = self.index.labels(labels)
        self._store = Store(folder)
        self._checked: set[int] = set()  # shards whose size was compared

    def __len__(self) -> int:
        return len(self.index)

    def read_image(self, i: int) -> bytes:
        """The picture file of sample i as it came."""
        samples = self.index.samples
        kind = "png" if samples.png[i] else "jpg"
        return self._member(i, kind, int(samples.offset[i]), int(samples.length[i]))

    def read_annotations(self, i: int) -> dict[str, Any]:
        """The raw record: image_id, width, height, and `annotations` (crowd included) as in the COCO file."""
        samples = self.index.samples
        data = self._member(i, "json", int(samples.json_offset[i]), int(samples.json_length[i]))
        try:
            record: dict[str, Any] = json.loads(data)
            found = (record["image_id"], record["width"], record["height"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._fault(i, f"has no annotation record ({error!r})") from None
        if found != (samples.image_id[i], samples.width[i], samples.height[i]):
            raise self._fault(i, f"has an annotation record of another image {found}")
        return record

    def sample(self, i: int) -> Sample:
        """Sample i, decoded."""
        record = self.read_annotations(i)
        size = (record["height"], record["width"])
        try:
            image = decode(self.read_image(i), size)
        except ShardError as error:
            raise self._fault(i, str(error)) from None
        try:
            boxes, categories = usable_boxes(record["annotations"], size)
            labels = np.array([self._labels[category] for category in categories], np.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise self._fault(i, f"has a malformed annotation ({error!r})") from None
        return Sample(record["image_id"], image, boxes, labels)

    def _member(self, i: int, kind: str, offset: int, length: int) -> bytes:
        shard = int(self.index.samples.shard[i])
        info = self.index.shards[shard]
        if shard not in self._checked:
            size = self._store.size(info.name)
            if size != info.bytes:
                raise ShardError(
                    f"{self._store.path(info.name)} has {size:,} bytes, its index says {info.bytes:,}: it is truncated "
                    f"or of another build; run `python -m jobs.shard verify {self.index.folder}`"
                )
            self._checked.add(shard)
        if not 0 < length <= MAX_BYTES or offset < HEADER:
            raise self._fault(i, f"has an impossible length {length} or offset {offset} in the index")
        data = self._store.read_range(info.name, offset - HEADER, HEADER + length)
        expected = f"{self.index.samples.image_id[i]:012d}.{kind}".encode()
        if data[:100].rstrip(b"\0") != expected:
            raise self._fault(i, f"is not where the index says (no {expected.decode()} there)")
        return data[HEADER:]

    def _fault(self, i: int, what: str) -> ShardError:
        shard = self.index.shards[int(self.index.samples.shard[i])].name
        return ShardError(
            f"{self._store.path(shard)}: sample {self.index.samples.image_id[i]:012d} {what}; "
            f"run `python -m jobs.shard verify {self.index.folder}`"
        )
