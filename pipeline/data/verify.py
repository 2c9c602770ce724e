"""Proving, describing and comparing shard folders: `python -m jobs.shard verify | info | diff`.

`verify_shards` trusts nothing: it hashes every tar, walks its headers itself, and compares each member with the index.
Faults of the data come back as a list of sentences, never as an exception, so that one run shows all of them.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator

import numpy as np

from pipeline.data.annotations import SHOWN, usable_boxes
from pipeline.data.dataset import HEADER, DetectionDataset
from pipeline.data.images import MAX_BYTES, check_decodes
from pipeline.data.index import INDEX, SAMPLES, ShardIndex
from pipeline.data.progress import Progress
from pipeline.data.storage import Store, is_url
from pipeline.errors import ShardError

MEMBER = re.compile(r"\d{12}\.(jpg|png|json)")
CHUNK = 8 * 2**20  # bytes hashed at a time


def verify_shards(folder: str) -> list[str]:
    """All faults of a shard folder or URL; an empty list proves it.

    Checked: index and sidecar, size and sha256 of each tar, that its members are exactly the index's (plain files,
    right names, places and lengths), that every record agrees with the index and every picture decodes at its size.

    Raises:
        ShardError: there is no such folder.
    """
    store = Store(folder)
    if not store.folder_exists():
        raise ShardError(f"there is no shard folder {folder}")
    try:
        dataset = DetectionDataset(folder)
    except ShardError as error:
        return [str(error)]
    faults = _foreign_files(dataset.index)
    with Progress(len(dataset.index.shards), "verifying", "shard") as bar:
        for number in range(len(dataset.index.shards)):
            try:
                faults += _shard_faults(dataset, store, number)
            except ShardError as error:
                faults.append(str(error))
            bar.advance()
    return faults


def describe(index: ShardIndex) -> list[str]:
    """Five lines: what a folder holds."""
    samples, total = index.samples, sum(shard.bytes for shard in index.shards)
    empty = int((samples.boxes == 0).sum())
    return [
        f"shards      {len(index.shards):,} in {index.folder}, {total / 1e6:,.1f} MB",
        f"images      {len(index):,}, of which {empty:,} without a box to train on",
        f"boxes       {samples.boxes.sum():,}, and {samples.crowds.sum():,} crowd regions",
        f"categories  {len(index.categories):,}",
        f"digest      {index.digest}",
    ]


def diff_shards(a: str, b: str) -> list[str]:
    """How two shard folders differ, as sentences; an empty list if they hold the same bytes in the same order.

    Raises:
        ShardError: one of them cannot be read.
    """
    first, second = DetectionDataset(a), DetectionDataset(b)
    if first.index.digest == second.index.digest:
        return []
    found = []
    if first.index.categories != second.index.categories:
        found.append(f"categories differ: {len(first.index.categories)} and {len(second.index.categories)}")
    ids_a, ids_b = first.index.samples.image_id, second.index.samples.image_id
    for name, only in ((a, np.setdiff1d(ids_a, ids_b)), (b, np.setdiff1d(ids_b, ids_a))):
        if len(only):
            found.append(f"{len(only)} images only in {name}: {_some(only.tolist())}")
    both, at_a, at_b = np.intersect1d(ids_a, ids_b, return_indices=True)
    pictures, records = [], []
    for image_id, i, j in zip(both.tolist(), at_a.tolist(), at_b.tolist(), strict=True):
        if first.read_image(i) != second.read_image(j):
            pictures.append(image_id)
        if first.read_annotations(i) != second.read_annotations(j):
            records.append(image_id)
    if pictures:
        found.append(f"{len(pictures)} images have different pictures: {_some(pictures)}")
    if records:
        found.append(f"{len(records)} images have different annotations: {_some(records)}")
    return found or [f"the same images, cut into {len(first.index.shards)} and {len(second.index.shards)} shards"]


def _shard_faults(dataset: DetectionDataset, store: Store, number: int) -> list[str]:
    info = dataset.index.shards[number]
    path, size = store.path(info.name), store.size(info.name)
    if size != info.bytes:
        return [f"{path} has {size:,} bytes, its index says {info.bytes:,}; copy it again or rebuild"]
    faults = []
    digest = hashlib.sha256()
    for start in range(0, size, CHUNK):
        digest.update(store.read_range(info.name, start, min(CHUNK, size - start)))
    if digest.hexdigest() != info.sha256:
        faults.append(f"{path} does not have the sha256 of its index; copy it again or rebuild")
    positions = np.flatnonzero(dataset.index.samples.shard == number)
    try:
        found = list(_walk(store, info.name, size))
    except ShardError as error:
        return [*faults, str(error)]
    expected = _expected(dataset.index, positions)
    if found != expected:
        at = next(
            k for k, pair in enumerate(zip([*found, None], [*expected, None], strict=False)) if pair[0] != pair[1]
        )
        is_, should = ([*found, None][at], [*expected, None][at])
        faults.append(f"{path}: member {at} is {is_}, the index says {should} (name, offset, length)")
        return faults
    return faults + [fault for i in positions.tolist() if (fault := _sample_fault(dataset, i))]


def _walk(store: Store, name: str, size: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, length) of each member; only plain files with our names are let through, nothing is skipped."""
    offset = 0
    while offset + HEADER <= size:
        block = store.read_range(name, offset, HEADER)
        if not any(block):
            if any(any(store.read_range(name, at, min(CHUNK, size - at))) for at in range(offset, size, CHUNK)):
                raise ShardError(f"{store.path(name)} has data after its end")
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise ShardError(f"{store.path(name)} has no tar header at byte {offset}: {error}") from None
        if not member.isreg() or not MEMBER.fullmatch(member.name):
            raise ShardError(f"{store.path(name)} has a foreign member {member.name!r} at byte {offset}")
        if member.size > MAX_BYTES:
            raise ShardError(f"{store.path(name)}: {member.name} has {member.size:,} bytes, over the cap {MAX_BYTES:,}")
        yield member.name, offset + HEADER, member.size
        offset += HEADER + -(-member.size // HEADER) * HEADER
    raise ShardError(f"{store.path(name)} ends without the end-of-archive blocks: it is truncated")


def _expected(index: ShardIndex, positions: np.ndarray) -> list[tuple[str, int, int]]:
    samples, members = index.samples, []
    for i in positions.tolist():
        key, kind = f"{samples.image_id[i]:012d}", "png" if samples.png[i] else "jpg"
        picture = (f"{key}.{kind}", int(samples.offset[i]), int(samples.length[i]))
        members += sorted([picture, (f"{key}.json", int(samples.json_offset[i]), int(samples.json_length[i]))])
    return members


def _sample_fault(dataset: DetectionDataset, i: int) -> str | None:
    samples = dataset.index.samples
    where = f"{dataset.index.shards[int(samples.shard[i])].name}: sample {samples.image_id[i]:012d}"
    try:
        record = dataset.read_annotations(i)
        check_decodes(dataset.read_image(i), (record["height"], record["width"]))
        boxes, categories = usable_boxes(record["annotations"], (record["height"], record["width"]))
        crowds = sum(annotation["iscrowd"] for annotation in record["annotations"])
    except ShardError as error:
        return f"{where} {error}"
    except (KeyError, TypeError, ValueError) as error:
        return f"{where} has a malformed annotation ({error!r})"
    if not set(categories) <= set(dataset.index.category_ids):
        return f"{where} has a category that the index does not know"
    if (len(boxes), crowds) != (samples.boxes[i], samples.crowds[i]):
        return f"{where} has {len(boxes)} boxes and {crowds} crowds, the index says otherwise"
    return None


def _foreign_files(index: ShardIndex) -> list[str]:
    if is_url(index.folder):
        return []
    known = {INDEX, SAMPLES, *(shard.name for shard in index.shards)}
    return [f"{index.folder} has a foreign file {name}" for name in sorted(set(os.listdir(index.folder)) - known)]


def _some(ids: list[int]) -> str:
    return ", ".join(str(i) for i in ids[:SHOWN]) + (" ..." if len(ids) > SHOWN else "")
