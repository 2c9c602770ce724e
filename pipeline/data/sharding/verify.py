"""Verifies shard folders (`python -m jobs.shard verify`).

`verify_shards` trusts nothing: it hashes every tar, reads its headers itself, compares each member with the index, and
decodes every image. Faults of the data are returned as a list of sentences, not raised, so that one run shows all.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.dataset import orientation_of
from pipeline.data.images import MAX_BYTES, check_decodes, read_orientation, turned_size
from pipeline.data.index import INDEX, ROW, SAMPLES, Samples, ShardIndex, ShardInfo, load_index
from pipeline.data.sharding import parallel
from pipeline.data.sharding.summary import SUMMARY, Summary, decode_summary
from pipeline.data.sharding.tars import Read, walk_headers
from pipeline.errors import ShardError
from pipeline.files.shard_files import Store
from pipeline.files.storage import is_url
from pipeline.progress import Progress

MEMBER = re.compile(r"\d{12}\.(jpg|png|json)")
READ_BYTES = 8 * 2**20  # per read


@dataclass(frozen=True)
class ShardClaim:
    """The index's claims about one tar: all that a process needs to verify it."""

    folder: str
    info: ShardInfo
    samples: Samples  # of this tar
    categories: frozenset[int]


@dataclass
class ShardReport:
    """The findings of one tar."""

    faults: list[str] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)


def verify_shards(folder: str, workers: int = 1) -> list[str]:
    """List all faults of a shard folder or URL; an empty list means that it is sound.

    It checks index and sidecar, size and sha256 of each tar, and the summary if there is one. The members of each tar
    must be those of the index: plain files with the right names, positions and lengths. Every record must agree with
    the index, every image must decode at its size, and an orientation to apply must be the image's own. `workers`
    tars are verified in parallel; more than 1 run as Ray tasks.

    Raises:
        ShardError: there is no such folder.
        ResourceError: more workers than CPUs.
    """
    store = Store(folder)
    if not store.folder_exists():
        raise ShardError(f"there is no shard folder {folder}")
    try:
        index = load_index(folder)
    except ShardError as error:
        return [str(error)]
    reports: dict[int, ShardReport] = {}
    claims = [_claim(index, number) for number in range(len(index.shards))]
    with Progress(len(claims), "verifying", "shard") as bar:
        for number, report in parallel.run(verify_shard, claims, workers):
            reports[number] = report
            bar.advance()
    faults = _foreign_files(index)
    for number in range(len(claims)):
        faults += reports[number].faults
    return faults or _summary_faults(store, index, [reports[number].summary for number in range(len(claims))])


def verify_shard(claim: ShardClaim) -> ShardReport:
    """Verify one tar. A remote tar is first copied to a temporary file, so that it is downloaded once."""
    report, store = ShardReport(), Store(claim.folder)
    path, info = store.path(claim.info.name), claim.info
    try:
        size = store.size(info.name)
        if size != info.bytes:
            report.faults.append(f"{path} has {size:,} bytes, its index says {info.bytes:,}; copy it again or rebuild")
            return report
        with _reading(store, info) as read:
            digest = hashlib.sha256()
            for start in range(0, size, READ_BYTES):
                digest.update(read(start, min(READ_BYTES, size - start)))
            if digest.hexdigest() != info.sha256:
                report.faults.append(f"{path} does not have the sha256 of its index; copy it again or rebuild")
            if fault := _member_fault(read, path, claim):
                report.faults.append(fault)
                return report
            for i in range(len(claim.samples)):
                if fault := _sample_fault(read, claim, i, report.summary):
                    report.faults.append(f"{path}: sample {claim.samples.image_id[i]:012d} {fault}")
    except ShardError as error:
        report.faults.append(str(error))
    return report


def _claim(index: ShardIndex, number: int) -> ShardClaim:
    positions = np.flatnonzero(index.samples.shard == number)
    samples = Samples(**{name: getattr(index.samples, name)[positions] for name in ROW.names or ()})
    return ShardClaim(index.folder, index.shards[number], samples, frozenset(index.category_ids))


@contextmanager
def _reading(store: Store, info: ShardInfo) -> Iterator[Read]:
    """Yield a function that reads a range of a tar; a remote tar is first copied to the local disk."""
    if not is_url(store.folder):
        yield lambda offset, length: store.read_range(info.name, offset, length)
        return
    with tempfile.TemporaryFile() as copy:
        for start in range(0, info.bytes, READ_BYTES):
            copy.write(store.read_range(info.name, start, min(READ_BYTES, info.bytes - start)))
        copy.flush()
        yield lambda offset, length: os.pread(copy.fileno(), length, offset)


def _member_fault(read: Read, path: str, claim: ShardClaim) -> str | None:
    """The first member that differs from the index, or is not a plain file with one of our names."""
    expected = _expected_members(claim.samples)
    at = 0
    for member in walk_headers(read, claim.info.bytes, path):
        if not member.plain or not MEMBER.fullmatch(member.name):
            return f"{path} has a foreign member {member.name!r:.120} ({member.what}) at byte {member.offset:,}"
        if member.length > MAX_BYTES:
            return f"{path}: {member.name} has {member.length:,} bytes, over the cap {MAX_BYTES:,}"
        found = (member.name, member.offset, member.length)
        if at == len(expected):
            return f"{path}: {_member_text(*found)} follows the last sample of its index"
        if found != expected[at]:
            return f"{path}: member {at} is {_member_text(*found)}, its index says {_member_text(*expected[at])}"
        at += 1
    return None if at == len(expected) else f"{path} ends before {_member_text(*expected[at])}, which its index lists"


def _expected_members(samples: Samples) -> list[tuple[str, int, int]]:
    """(name, offset, length) of each member, in the order of the tar."""
    members = []
    for i in range(len(samples)):
        key, kind = f"{samples.image_id[i]:012d}", "png" if samples.png[i] else "jpg"
        file = (f"{key}.{kind}", int(samples.offset[i]), int(samples.length[i]))
        members += sorted([file, (f"{key}.json", int(samples.json_offset[i]), int(samples.json_length[i]))])
    return members


def _member_text(name: str, offset: int, length: int) -> str:
    return f"{name} ({length:,} bytes at {offset:,})"


def _sample_fault(read: Read, claim: ShardClaim, i: int, summary: Summary) -> str | None:
    samples = claim.samples
    try:
        record: dict[str, Any] = json.loads(read(int(samples.json_offset[i]), int(samples.json_length[i])))
        size = (record["height"], record["width"])
        found = (record["image_id"], *size)
        if found != (samples.image_id[i], samples.height[i], samples.width[i]):
            return f"has the annotation record of another image {found}"
        orientation = orientation_of(record)
        data = read(int(samples.offset[i]), int(samples.length[i]))
        check_decodes(data, turned_size(size, orientation))
        if orientation not in (1, found_in := read_orientation(data)):
            return f"has orientation {orientation} in its record, {found_in} in the EXIF of its image"
        if unknown := {annotation["category_id"] for annotation in record["annotations"]} - claim.categories:
            return f"has a category that the index does not know: {sorted(unknown)}"
        boxes, crowds = summary.add(record["annotations"], size, orientation)
    except ShardError as error:
        return str(error)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        return f"has a malformed annotation record ({error!r:.200})"
    if (boxes, crowds) != (samples.boxes[i], samples.crowds[i]):
        return f"has {boxes} boxes and {crowds} crowds, its index says {samples.boxes[i]} and {samples.crowds[i]}"
    return None


def _foreign_files(index: ShardIndex) -> list[str]:
    if is_url(index.folder):
        return []
    known = {INDEX, SAMPLES, SUMMARY, *(shard.name for shard in index.shards)}
    return [f"{index.folder} has a foreign file {name}" for name in sorted(set(os.listdir(index.folder)) - known)]


def _summary_faults(store: Store, index: ShardIndex, counted: list[Summary]) -> list[str]:
    if not store.exists(SUMMARY):
        return []
    total = Summary()
    for summary in counted:
        total.merge(summary)
    if decode_summary(store.read(SUMMARY), index.digest) == total:
        return []
    return [f"{store.path(SUMMARY)} does not match the shards; delete it, `jobs.shard info` counts without it"]
