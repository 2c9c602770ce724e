"""Compares two shard folders (`python -m jobs.shard diff`).

Both indexes are trusted; use `verify` to prove a folder. A folder that cannot be read is a ShardError.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.dataset import DetectionDataset, orientation_of
from pipeline.data.index import Category, ShardIndex
from pipeline.data.sharding.rules import SHOWN
from pipeline.progress import Progress


def diff_shards(a: str, b: str) -> list[str]:
    """List the differences of two shard folders; empty if they hold the same bytes in the same order.

    Raises:
        ShardError: one of them cannot be read.
    """
    first, second = DetectionDataset(a), DetectionDataset(b)
    if first.index.digest == second.index.digest:
        return []
    found = list_category_differences(a, first.index.categories, b, second.index.categories)
    ids_a, ids_b = first.index.samples.image_id, second.index.samples.image_id
    for name, only in ((a, np.setdiff1d(ids_a, ids_b)), (b, np.setdiff1d(ids_b, ids_a))):
        if len(only):
            found.append(f"{len(only):,} images only in {name}: {_some(only.tolist())}")
    both, at_a, at_b = np.intersect1d(ids_a, ids_b, return_indices=True)
    apart = np.flatnonzero(~_stored_alike(first.index, at_a, second.index, at_b))
    files, records, turned = [], [], []
    removed = added = changed = 0
    with Progress(len(apart), "comparing", "image") as bar:
        for image_id, i, j in zip(both[apart].tolist(), at_a[apart].tolist(), at_b[apart].tolist(), strict=True):
            if first.read_image(i) != second.read_image(j):
                files.append(image_id)
            before, after = first.read_annotations(i), second.read_annotations(j)
            if orientation_of(before) != orientation_of(after):
                turned.append(image_id)
            old, new = _by_id(before), _by_id(after)
            if old != new:
                records.append(image_id)
                removed += len(old.keys() - new.keys())
                added += len(new.keys() - old.keys())
                changed += sum(old[key] != new[key] for key in old.keys() & new.keys())
            bar.advance()
    if files:
        found.append(f"{len(files):,} images have different files: {_some(files)}")
    if turned:
        found.append(f"{len(turned):,} images have another EXIF orientation: {_some(turned)}")
    if records:
        what = f"{removed:,} annotations removed, {added:,} added, {changed:,} changed"
        found.append(f"{len(records):,} images have different annotations ({what}): {_some(records)}")
    return found or [f"the same images, cut into {len(first.index.shards)} and {len(second.index.shards)} shards"]


def list_category_differences(a: str, first: tuple[Category, ...], b: str, second: tuple[Category, ...]) -> list[str]:
    """A line for each of `a` and `b` that has categories which the other one does not have."""
    old, new = set(first), set(second)
    return [
        f"{len(only):,} categories only in {name}: "
        + _some([f"{category.name} ({category.id})" for category in sorted(only, key=lambda category: category.id)])
        for name, only in ((a, old - new), (b, new - old))
        if only
    ]


def _stored_alike(a: ShardIndex, at_a: NDArray[Any], b: ShardIndex, at_b: NDArray[Any]) -> NDArray[np.bool_]:
    """Which pairs of samples are at the same position of tars with the same sha256, and need not be read."""
    digests = [np.array([shard.sha256 for shard in index.shards]) for index in (a, b)]
    same = digests[0][a.samples.shard[at_a]] == digests[1][b.samples.shard[at_b]]
    for name in ("offset", "length", "json_offset", "json_length"):
        same &= getattr(a.samples, name)[at_a] == getattr(b.samples, name)[at_b]
    return np.asarray(same)


def _by_id(record: dict[str, Any]) -> dict[Any, Any]:
    size = (record["height"], record["width"])
    return {annotation["id"]: (annotation, size) for annotation in record["annotations"]}


def _some(items: list[Any]) -> str:
    return ", ".join(str(item) for item in items[:SHOWN]) + (" ..." if len(items) > SHOWN else "")
