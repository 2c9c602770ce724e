"""The index of a shard folder: `index.json` (contents, with digests) and `samples.npy` (position of every sample).

`index.json` is written last, so a folder that has one is complete. An index that is missing, foreign, damaged or of
another version raises a ShardError that names the command to run.
"""

import dataclasses
import hashlib
import io
import json
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ShardError
from pipeline.files.shard_files import MissingFileError, Store

FORMAT = "coco-webdataset-shards"
VERSION = 1
TURNED_VERSION = 2  # some records have an orientation to apply, which readers of version 1 would ignore
INDEX = "index.json"
SAMPLES = "samples.npy"
DEMO_FOLDERS = ("runs/demo/data/train", "runs/demo/data/val")  # as in jobs/configs/demo.yaml
MAX_REQUESTS = 16  # to a remote store at the same time
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.tar")
DIGEST = re.compile(r"[0-9a-f]{64}")
# One row per sample; explicit byte order, so that the file is the same on every machine.
ROW = np.dtype(
    [
        ("image_id", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("boxes", "<i4"),  # annotations that training uses: not crowd, not empty after clamping
        ("crowds", "<i4"),
        ("shard", "<i4"),
        ("png", "<i4"),  # 1 for .png, 0 for .jpg
        ("offset", "<i8"),  # of the image's first byte in its tar
        ("length", "<i8"),
        ("json_offset", "<i8"),
        ("json_length", "<i8"),
    ]
)

LabelMode = Literal["contiguous", "raw"]


@dataclass(frozen=True, eq=False)
class Category:
    """A class of the data set: the annotation file's id and name.

    Names of the same letters are equal, whether an accent is a character of its own (as macOS writes it) or not.
    """

    id: int
    name: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Category) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, str]:
        return self.id, unicodedata.normalize("NFC", self.name)


@dataclass(frozen=True)
class ShardInfo:
    """One tar of the folder."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, eq=False)
class Samples:
    """Per-sample columns, each of length S, in ascending order of image id. Fields as in ROW."""

    image_id: NDArray[np.int64]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    boxes: NDArray[np.int32]
    crowds: NDArray[np.int32]
    shard: NDArray[np.int32]
    png: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    json_offset: NDArray[np.int64]
    json_length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.image_id)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The contents of a shard folder. Equal `digest`s mean equal data sets: the same bytes in the same order."""

    folder: str
    version: int
    source_digest: str  # sha256 of the annotation file
    digest: str
    categories: tuple[Category, ...]  # ascending by id; contiguous label k is categories[k]
    shards: tuple[ShardInfo, ...]
    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Category id of each contiguous label."""
        return tuple(category.id for category in self.categories)

    def labels(self, mode: LabelMode) -> dict[int, int]:
        """Category id -> label: 0..K-1 (`contiguous`), or the id itself (`raw`, the published 91-logit layout)."""
        return {category: category if mode == "raw" else k for k, category in enumerate(self.category_ids)}

    def sizes(self) -> NDArray[np.int64]:
        """Original (height, width) of every sample, [S, 2]."""
        return np.stack([self.samples.height, self.samples.width], axis=1).astype(np.int64)


def dataset_digest(categories: tuple[Category, ...], shards: tuple[ShardInfo, ...]) -> str:
    """sha256 over the categories and the tars' digests; file names and the source of the annotations do not count."""
    content = {
        "version": VERSION,  # of this digest; the additions of index version 2 are in the tars
        "categories": [[category.id, category.name] for category in categories],
        "shards": [[shard.sha256, shard.samples] for shard in shards],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def encode_index(
    categories: tuple[Category, ...],
    shards: tuple[ShardInfo, ...],
    rows: NDArray[np.void],
    source_digest: str,
    turned: bool = False,
) -> dict[str, bytes]:
    """The bytes of the two files, by name; `index.json` comes last, because it declares the folder complete.

    `turned`: whether a record has an orientation; the file is then of version 2.
    """
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    table = buffer.getvalue()
    document = {
        "format": FORMAT,
        "version": TURNED_VERSION if turned else VERSION,
        "digest": dataset_digest(categories, shards),
        "source_digest": source_digest,
        "samples": len(rows),
        "samples_file": {"name": SAMPLES, "bytes": len(table), "sha256": hashlib.sha256(table).hexdigest()},
        "categories": [dataclasses.asdict(category) for category in categories],
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    return {SAMPLES: table, INDEX: (json.dumps(document, indent=1) + "\n").encode()}


def load_index(folder: str) -> ShardIndex:
    """Read and check the index of a local folder or fsspec URL.

    Raises:
        ShardError: there is no index, it is foreign or of another version, or the files contradict each other.
    """
    store = Store(str(folder))
    try:
        text = store.read(INDEX)
    except MissingFileError:
        raise ShardError(_explain_missing(store)) from None
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ShardError(f"{store.path(INDEX)} is not a shard index; give a folder written by `jobs.shard build`")
        if document.get("version") not in (VERSION, TURNED_VERSION):
            raise ShardError(
                f"{store.path(INDEX)} has version {document.get('version')}, this code reads {VERSION} and "
                f"{TURNED_VERSION}; build the shards again with `python -m jobs.shard build`"
            )
        return _parse(store, document)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ShardError(f"{store.path(INDEX)} is damaged ({error!r}); build the shards again") from None


def check_shards(index: ShardIndex) -> None:
    """Check that every tar of the index exists with its full size, without reading it.

    Raises:
        ShardError: tars are missing, truncated or too long; the message counts all and names some.
    """
    store = Store(index.folder)
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:  # a remote store answers slowly
        faults = [fault for fault in pool.map(partial(_fault, store), index.shards) if fault]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ShardError(
            f"{store.folder} is not complete: {', '.join(faults[:3])}{more}; copy or build these shards again, "
            f"`python -m jobs.shard verify {store.folder}` checks them"
        )


def _fault(store: Store, shard: ShardInfo) -> str:
    try:
        size = store.size(shard.name)
    except MissingFileError:
        return f"{shard.name} is missing"
    return "" if size == shard.bytes else f"{shard.name} has {size:,} bytes of {shard.bytes:,}"


def _parse(store: Store, document: dict[str, Any]) -> ShardIndex:
    categories = tuple(Category(int(c["id"]), str(c["name"])) for c in document["categories"])
    shards = tuple(ShardInfo(s["name"], int(s["bytes"]), s["sha256"], int(s["samples"])) for s in document["shards"])
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard.name):
            raise ShardError(f"{store.path(INDEX)} names a shard {shard.name!r}, which is not a plain file name")
        if not DIGEST.fullmatch(shard.sha256):  # it names a file of the cache
            raise ShardError(f"{store.path(INDEX)} gives shard {shard.name} a sha256 that is not valid")
    table = store.read(SAMPLES)
    if hashlib.sha256(table).hexdigest() != document["samples_file"]["sha256"]:
        raise ShardError(f"{store.path(SAMPLES)} does not belong to its index; build the shards again")
    rows = _rows(table, int(document["samples"]))
    columns = {name: np.ascontiguousarray(rows[name]) for name in ROW.names or ()}
    samples = Samples(**columns)
    digest = dataset_digest(categories, shards)
    sane = (
        all(bool(np.all(column >= 0)) for column in columns.values())
        and bool(np.all(samples.image_id[1:] > samples.image_id[:-1]))
        and bool(np.all(samples.shard < len(shards)))
        and np.bincount(samples.shard, minlength=len(shards)).tolist() == [shard.samples for shard in shards]
    )
    if not sane or digest != document["digest"]:
        raise ShardError(f"{store.path(INDEX)} contradicts itself; build the shards again")
    version = int(document["version"])
    return ShardIndex(store.folder, version, str(document["source_digest"]), digest, categories, shards, samples)


def _rows(table: bytes, count: int) -> NDArray[np.void]:
    """Parse `samples.npy` without NumPy's reader, which evaluates the header and allocates the size it claims."""
    start = 10 + int.from_bytes(table[8:10], "little")
    fits = table.startswith(b"\x93NUMPY\x01\x00") and len(table) == start + count * ROW.itemsize
    if count < 0 or not fits or str(ROW.descr).encode() not in table[:start]:
        raise ValueError(f"{SAMPLES} does not hold {count} rows of the known fields")
    return np.frombuffer(table, ROW, offset=start)


def _explain_missing(store: Store) -> str:
    command = "`python -m jobs.shard build DATASET OUT` or `build ANNOTATIONS IMAGES OUT`"
    if not store.folder_exists():
        if store.folder.endswith(DEMO_FOLDERS):
            return f"there is no {store.folder} yet; `python -m jobs.demo --data` draws the demo's data"
        return f"there is no shard folder {store.folder}; write one with {command}"
    if splits := [store.path(name) for name in ("train", "val", "test") if store.exists(f"{name}/{INDEX}")]:
        return f"{store.folder} is not a shard folder, but holds one for each split; name one: {', '.join(splits)}"
    return f"{store.folder} has no {INDEX}: it is not a shard folder, or its build was stopped; run {command} (again)"
