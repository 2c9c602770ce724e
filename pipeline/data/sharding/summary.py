"""Counts of a shard folder: images, boxes by COCO's size classes, crowd regions, and the same for each class.

`shard_writer` counts while it writes a shard. The total is stored in `summary.json` beside the index, shown by
`jobs.shard build` and `info`, and counted again by `verify`. Without a valid file, `info` counts the records.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from pipeline.data.dataset import DetectionDataset, orientation_of
from pipeline.data.index import ShardIndex
from pipeline.data.records import usable_annotations
from pipeline.files.shard_files import Store
from pipeline.progress import Progress

SUMMARY = "summary.json"
FORMAT = "coco-webdataset-summary"
VERSION = 1
SMALL, MEDIUM = 32**2, 96**2  # square pixels of `area`: pycocotools' upper limits of small and medium objects


@dataclass
class ClassCounts:
    """One category."""

    images: int = 0  # with at least one box to train on
    boxes: int = 0
    crowds: int = 0


@dataclass
class Summary:
    """Counts over images. Boxes are those that training uses: not crowd, with area inside the image."""

    images: int = 0
    empty: int = 0  # images without a box
    small: int = 0
    medium: int = 0
    large: int = 0
    crowds: int = 0
    dropped: int = 0  # boxes without area inside their image
    classes: dict[int, ClassCounts] = field(default_factory=dict)  # by category id
    turned: int = 0  # images whose EXIF orientation is applied

    @property
    def boxes(self) -> int:
        """Boxes that training uses."""
        return self.small + self.medium + self.large

    def add(
        self, annotations: Iterable[dict[str, Any]], size: tuple[int, int], orientation: int = 1
    ) -> tuple[int, int]:
        """Count one image of (height, width), with the orientation of its record.

        Returns:
            Its number of boxes and of crowd regions.
        """
        annotations = list(annotations)
        _, usable = usable_annotations(annotations, size)
        crowds = [annotation["category_id"] for annotation in annotations if annotation["iscrowd"]]
        self.images += 1
        self.turned += orientation != 1
        self.empty += not usable
        self.dropped += len(annotations) - len(crowds) - len(usable)
        self.crowds += len(crowds)
        for annotation in usable:
            area = annotation["area"]
            self.small += area < SMALL
            self.medium += SMALL <= area < MEDIUM
            self.large += area >= MEDIUM
            self._of(annotation["category_id"]).boxes += 1
        for category in {annotation["category_id"] for annotation in usable}:
            self._of(category).images += 1
        for category in crowds:
            self._of(category).crowds += 1
        return len(usable), len(crowds)

    def merge(self, other: Self) -> None:
        """Add the counts of another summary."""
        for name in ("images", "empty", "small", "medium", "large", "crowds", "dropped", "turned"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for category, counts in other.classes.items():
            mine = self._of(category)
            mine.images += counts.images
            mine.boxes += counts.boxes
            mine.crowds += counts.crowds

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON; `from_json` is the inverse. A `turned` of 0 is omitted, as in files of version 0.1."""
        content = asdict(self) | {"classes": {str(key): asdict(self.classes[key]) for key in sorted(self.classes)}}
        return {key: value for key, value in content.items() if key != "turned" or value}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for anything that `to_json` does not return."""
        classes = {int(key): ClassCounts(**counts) for key, counts in content["classes"].items()}
        return cls(**content | {"classes": classes})

    def table(self, index: ShardIndex) -> list[str]:
        """The totals, and a line per category of the index."""
        sizes = f"{self.small:,} small, {self.medium:,} medium, {self.large:,} large"
        total = sum(shard.bytes for shard in index.shards)
        lines = [
            f"shards      {len(index.shards):,} in {index.folder}, {total / 2**20:,.1f} MiB",
            f"images      {self.images:,}, of which {self.empty:,} without a box to train on",
            f"boxes       {self.boxes:,} to train on; by COCO's areas {sizes}",
            f"crowd       {self.crowds:,} regions, which only evaluation uses",
            f"dropped     {self.dropped:,} boxes without area inside their image",
            *([f"turned      {self.turned:,} images by their EXIF orientation when they are read"] * bool(self.turned)),
            f"digest      {index.digest}",
            f"categories  {len(index.categories):,}",
            f"  {'id':>6}  {'name':24} {'images':>9} {'boxes':>9} {'crowd':>7}",
        ]
        for category in index.categories:
            counts = self.classes.get(category.id, ClassCounts())
            name = category.name if len(category.name) <= 24 else f"{category.name[:23]}…"
            numbers = f"{counts.images:9,} {counts.boxes:9,} {counts.crowds:7,}"
            lines.append(f"  {category.id:6}  {name:24} {numbers}")
        return lines

    def _of(self, category: int) -> ClassCounts:
        return self.classes.setdefault(category, ClassCounts())


def encode_summary(summary: Summary, dataset_digest: str) -> bytes:
    """The bytes of `summary.json`."""
    document = {"format": FORMAT, "version": VERSION, "dataset": dataset_digest, **summary.to_json()}
    return (json.dumps(document, indent=1) + "\n").encode()


def decode_summary(data: bytes, dataset_digest: str) -> Summary | None:
    """The summary of this data set, or None if the bytes are not its summary."""
    try:
        document = json.loads(data)
        head = (document.pop("format"), document.pop("version"), document.pop("dataset"))
        return Summary.from_json(document) if head == (FORMAT, VERSION, dataset_digest) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def load_summary(index: ShardIndex) -> Summary:
    """Read the summary of a shard folder, or count the records if no file belongs to the index.

    Raises:
        ShardError: a record cannot be read.
    """
    store = Store(index.folder)
    if store.exists(SUMMARY) and (stored := decode_summary(store.read(SUMMARY), index.digest)):
        return stored
    summary, data = Summary(), DetectionDataset(index.folder)
    with Progress(len(data), "counting", "image") as bar:
        for i in range(len(data)):
            record = data.read_annotations(i)
            summary.add(record["annotations"], (record["height"], record["width"]), orientation_of(record))
            bar.advance()
    return summary
