"""Packing a COCO-format data set into tar shards with an index; `python -m jobs.shard build` is its command.

The plan comes first: images by ascending id, cut into tars by number or by size. Each tar then is a pure function of
its plan and the pictures (`shard_writer`), so any number of processes, on one machine or many, writes the same bytes. A
build that is run again keeps the tars that were finished. `index.json` comes last and declares the folder complete.
Input is checked before the first byte is written. Faults are AnnotationError (the input as it lies), ShardError (a
picture that does not decode, the folder), ResourceError.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.data.index import INDEX, ROW, VERSION, ShardIndex, dataset_digest, encode_index, load_index
from pipeline.data.sharding import parallel
from pipeline.data.sharding.annotations import CocoImage, CocoSource, lint_command, refuse
from pipeline.data.sharding.lint import examine
from pipeline.data.sharding.orientation import Exif, question
from pipeline.data.sharding.output import BUILD, Output
from pipeline.data.sharding.pictures import Picture
from pipeline.data.sharding.shard_writer import Receipt, ShardPlan, receipt_name, write_shard
from pipeline.data.sharding.summary import SUMMARY, Summary, encode_summary
from pipeline.data.sharding.tars import BLOCK, stored
from pipeline.errors import PipelineError, ShardError
from pipeline.files.shard_files import is_shard_url
from pipeline.progress import Progress

SAMPLES_PER_SHARD = 512  # about 80 MB of COCO

Sample = tuple[CocoImage, Picture]


def build_shards(
    annotations: Path | str,
    images: Path | str,
    out: Path | str,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    mib_per_shard: int | None = None,
    workers: int = 1,
    limit: int | None = None,
    exif: Exif = "auto",
) -> ShardIndex:
    """Pack the data set; the same bytes whatever the number of workers, and nothing written if the input is faulty.

    Args:
        annotations: COCO instances JSON.
        images: folder, zip, tar or folder of tars with the pictures that it names.
        out: new or unfinished folder, or a URL that fsspec can write; a finished one of the same data set is left as it
            is.
        samples_per_shard: images per tar.
        mib_per_shard: cut by size instead: no tar is larger, unless one sample alone is.
        workers: tars written at a time; more than 1 runs them as Ray tasks (on `RAY_ADDRESS` if set, else locally; on
            a cluster the paths must be on storage that all nodes see).
        limit: only the first images by id.
        exif: `apply` where boxes and sizes are those of the pictures as viewers show them, `ignore` where they are
            those of the stored pixels; `auto` decides by the sizes, and refuses a set that leaves it open.

    Raises:
        AnnotationError: the annotations or pictures have faults that `rules` refuses; all of them in one message.
        ShardError: a picture does not decode, or `out` holds something else or cannot be written.
        ResourceError: more workers than CPUs.
    """
    if min(samples_per_shard, workers, *(n for n in (limit, mib_per_shard) if n is not None)) < 1:
        raise ShardError("--samples-per-shard, --mib-per-shard, --workers and --limit must be at least 1")
    target = Output(str(out) if is_shard_url(str(out)) else os.path.abspath(out))
    examined = examine(Path(annotations), str(images), limit=limit, exif=exif)
    command = lint_command(Path(annotations), str(images))
    advice = question(examined.orientations.values(), examined.findings, command)
    refuse(Path(annotations), examined.findings, str(images), advice)
    source = examined.source
    prefix = _prefix(Path(images), source)
    plans = plan_shards(examined.samples, prefix, target.folder, samples_per_shard, mib_per_shard)
    present = target.names()
    if INDEX in present and BUILD not in present:
        return _reuse(load_index(str(out)), source, plans)
    fresh = _prepare(target, plans)
    try:
        receipts = _write_all(target, plans, workers)
    except PipelineError:
        _tidy(target, fresh)
        raise
    turned = any(image.orientation != 1 for image, _ in examined.samples)
    _finish(target, source, receipts, turned)
    return load_index(str(out))


def plan_shards(
    samples: Sequence[Sample],
    prefix: str,
    out: str,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    mib_per_shard: int | None = None,
) -> list[ShardPlan]:
    """Which samples, by ascending image id, go into which tar `OUT/PREFIX-NUMBER.tar`; see `build_shards`."""
    plans = []
    for number, part in enumerate(_cut(samples, samples_per_shard, mib_per_shard)):
        name = f"{prefix}-{number:06d}.tar"
        digest = hashlib.sha256(json.dumps([VERSION, number, name]).encode())
        for image, picture in part:
            digest.update(json.dumps([image.file_name, picture.length, picture.stamp, len(image.record)]).encode())
            digest.update(image.record)
        plans.append(ShardPlan(number, name, out, tuple(part), digest.hexdigest()))
    return plans


def _cut(samples: Sequence[Sample], count: int, mib: int | None) -> Iterator[Sequence[Sample]]:
    """Consecutive samples for each tar: `count` of them, or as many as keep it within `mib` MiB."""
    if mib is None:
        yield from (samples[start : start + count] for start in range(0, len(samples), count))
        return
    room = mib * 2**20 // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * BLOCK  # a tar ends with two blocks of zeros
    start, used = 0, 0
    for number, (image, picture) in enumerate(samples):
        size = stored(picture.length) + stored(len(image.record))
        if number > start and used + size > room:
            yield samples[start:number]
            start, used = number, 0
        used += size
    yield samples[start:]


def _prefix(images: Path, source: CocoSource) -> str:
    """Start of the tars' names. Folder and digest keep two splits apart in any cache that goes by file names."""
    place = images.resolve()
    stem = (place.name if place.is_dir() else place.stem)[:80]
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in stem).lstrip("._-")
    return f"{safe or 'images'}-{source.digest[:8]}"


def _prepare(target: Output, plans: list[ShardPlan]) -> bool:
    """Make the folder ready, without what a stopped build left that this one does not want; True if it was empty."""
    fresh = target.prepare()
    wanted = {receipt_name(plan.name) for plan in plans}
    target.remove(INDEX)  # of a build that was stopped at its very end: it may not fit what is written now
    for name in target.names(BUILD):
        if f"{BUILD}/{name}" in wanted:
            continue
        if name.endswith(".tar.json"):
            target.remove(name.removesuffix(".json"))
        target.remove(f"{BUILD}/{name}")
    return fresh


def _tidy(target: Output, fresh: bool) -> None:
    """After a fault, leave nothing behind, unless finished tars can be kept for the next attempt."""
    if not any(name.endswith(".tar.json") for name in target.names(BUILD)):
        target.remove(BUILD)
        if fresh:
            target.remove_empty()


def _write_all(target: Output, plans: list[ShardPlan], workers: int) -> list[Receipt]:
    receipts: dict[int, Receipt] = {}
    with Progress(len(plans), "writing shards", "shard") as bar:
        for number, receipt in parallel.run(write_shard, plans, workers):
            receipts[number] = receipt
            bar.advance()
    for receipt in receipts.values():
        if target.size(receipt.info.name) != receipt.info.bytes:
            raise ShardError(
                f"{receipt.info.name} was written, but {target.folder} as this machine sees it does not hold it: on a "
                "cluster OUT must be on storage that all nodes share, or a URL"
            )
    return [receipts[number] for number in range(len(plans))]


def _finish(target: Output, source: CocoSource, receipts: list[Receipt], turned: bool) -> None:
    rows = np.array([tuple(row) for receipt in receipts for row in receipt.rows], ROW)
    shards = tuple(receipt.info for receipt in receipts)
    summary = Summary()
    for receipt in receipts:
        summary.merge(receipt.summary)
    files = encode_index(source.categories, shards, rows, source.digest, turned)
    target.write(SUMMARY, encode_summary(summary, dataset_digest(source.categories, shards)))
    for name, data in files.items():  # the index last
        target.write(name, data)
    target.remove(BUILD)


def _reuse(index: ShardIndex, source: CocoSource, plans: list[ShardPlan]) -> ShardIndex:
    """A finished folder is the result if it holds these annotations and pictures, and an error otherwise."""
    same = (
        index.source_digest == source.digest
        and index.samples.length.tolist() == [picture.length for plan in plans for _, picture in plan.samples]
        and index.samples.json_length.tolist() == [len(image.record) for plan in plans for image, _ in plan.samples]
        and [shard.samples for shard in index.shards] == [len(plan.samples) for plan in plans]
    )
    if not same:
        raise ShardError(
            f"{index.folder} already holds another data set or was built by other flags ({index.digest[:12]}); "
            "delete it or give a new folder"
        )
    return index
