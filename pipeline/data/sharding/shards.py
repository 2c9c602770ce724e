"""Packs a COCO-format data set into tar shards with an index (`python -m jobs.shard build`).

First comes the plan: images by ascending id, split into tars by number or by size. Each tar is a pure function of its
plan and the images (`shard_writer`). So any number of processes, on one machine or many, writes the same bytes. A
build that is run again keeps finished tars. `index.json` is written last and declares the folder complete. All input is
checked before the first byte is written. Errors: AnnotationError (the input), ShardError (an image that does not
decode, or the folder), ResourceError.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.index import INDEX, ROW, VERSION, ShardIndex, dataset_digest, encode_index, load_index
from pipeline.data.sharding import parallel
from pipeline.data.sharding.annotations import CocoImage, CocoSource, lint_command, refuse
from pipeline.data.sharding.image_files import ImageFile
from pipeline.data.sharding.lint import examine
from pipeline.data.sharding.orientation import Exif, orientation_advice
from pipeline.data.sharding.output import BUILD, Output
from pipeline.data.sharding.shard_writer import Receipt, ShardPlan, receipt_name, write_shard
from pipeline.data.sharding.summary import SUMMARY, Summary, encode_summary
from pipeline.data.sharding.tars import BLOCK, padded_size
from pipeline.errors import PipelineError, ShardError
from pipeline.files.shard_files import is_shard_url
from pipeline.progress import Progress

SAMPLES_PER_SHARD = 512  # about 80 MB of COCO

Sample = tuple[CocoImage, ImageFile]


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
    """Pack the data set. The bytes do not depend on the number of workers; faulty input writes nothing.

    Args:
        annotations: COCO instances JSON.
        images: folder, zip, tar or folder of tars with the images that it names.
        out: new or unfinished folder, or a URL that fsspec can write; a finished folder of the same data set is not
            changed.
        samples_per_shard: images per tar.
        mib_per_shard: split by size instead: no tar is larger, unless a single sample is.
        workers: tars that are written in parallel; more than 1 run as Ray tasks (on `RAY_ADDRESS` if set, else
            locally; on a cluster the paths must be on storage that all nodes see).
        limit: only the first images by id.
        exif: `apply` where boxes and sizes are those of the images as viewers show them, `ignore` where they are
            those of the stored pixels; `auto` decides by the sizes, and refuses a set where they decide nothing.

    Raises:
        AnnotationError: `rules` refuses the annotations or images; one message lists all faults.
        ShardError: an image does not decode, or `out` holds other files or cannot be written.
        ResourceError: more workers than CPUs.
    """
    check_numbers(samples_per_shard, mib_per_shard, workers, limit)
    target = Output(str(out) if is_shard_url(str(out)) else os.path.abspath(out))
    examined = examine(Path(annotations), str(images), limit=limit, exif=exif)
    command = lint_command(Path(annotations), str(images))
    advice = orientation_advice(examined.orientations.values(), examined.findings, command)
    refuse(Path(annotations), examined.findings, str(images), advice)
    source = examined.source
    folder = Path(images).resolve()
    prefix = tar_prefix(folder.name if folder.is_dir() else folder.stem, source)
    plans = plan_shards(examined.samples, prefix, target.folder, samples_per_shard, mib_per_shard)
    write_folders([PlannedFolder(target, source, tuple(plans))], workers)
    return load_index(str(out))


@dataclass(frozen=True)
class PlannedFolder:
    """A shard folder and all that goes into it."""

    target: Output
    source: CocoSource
    plans: tuple[ShardPlan, ...]


def check_numbers(samples_per_shard: int, mib_per_shard: int | None, workers: int, limit: int | None) -> None:
    """Raise ShardError for a number below 1."""
    if min(samples_per_shard, workers, *(n for n in (limit, mib_per_shard) if n is not None)) < 1:
        raise ShardError("--samples-per-shard, --mib-per-shard, --workers and --limit must be at least 1")


def write_folders(folders: Sequence[PlannedFolder], workers: int) -> None:
    """Write all tars of all folders, then the indexes; a finished folder of the same data set is not changed.

    Raises:
        ShardError, ResourceError: see `build_shards`; no index is written.
    """
    unfinished = []
    for folder in folders:  # all are checked before the first is written
        present = folder.target.names()
        if INDEX in present and BUILD not in present:
            _check_same(load_index(folder.target.folder), folder)
        else:
            unfinished.append(folder)
    prepared: list[tuple[Output, bool]] = []
    receipts = []
    try:
        for folder in unfinished:
            prepared.append((folder.target, _prepare(folder.target, folder.plans)))
        for folder in unfinished:
            receipts.append(_write_all(folder.target, folder.plans, workers))
        for folder, written in zip(unfinished, receipts, strict=True):
            turned = any(image.orientation != 1 for plan in folder.plans for image, _ in plan.samples)
            _finish(folder.target, folder.source, written, turned)
    except PipelineError:
        for target, fresh in prepared:
            _tidy(target, fresh)
        raise
    finally:
        for folder in unfinished:
            folder.target.release()


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
        for image, file in part:
            digest.update(json.dumps([image.file_name, file.length, file.stamp, len(image.record)]).encode())
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
    for number, (image, file) in enumerate(samples):
        size = padded_size(file.stored_length) + padded_size(len(image.record))
        if number > start and used + size > room:
            yield samples[start:number]
            start, used = number, 0
        used += size
    yield samples[start:]


def tar_prefix(name: str, source: CocoSource) -> str:
    """Beginning of the tars' names. Name and digest tell two splits apart in caches that use file names."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name[:80]).lstrip("._-")
    return f"{safe or 'images'}-{source.digest[:8]}"


def _prepare(target: Output, plans: Sequence[ShardPlan]) -> bool:
    """Prepare the folder and remove tars of a stopped build with another plan; True if it was empty."""
    fresh = target.prepare()
    wanted = {receipt_name(plan.name) for plan in plans}
    target.remove(INDEX)  # left by a build that stopped just before its end; it may not match the new tars
    for name in target.names(BUILD):
        if f"{BUILD}/{name}" in wanted:
            continue
        if name.endswith(".tar.json"):
            target.remove(name.removesuffix(".json"))
        target.remove(f"{BUILD}/{name}")
    return fresh


def _tidy(target: Output, fresh: bool) -> None:
    """After a fault remove everything, unless the next attempt can use finished tars."""
    if not any(name.endswith(".tar.json") for name in target.names(BUILD)):
        target.remove(BUILD)
        if fresh:
            target.remove_empty()


def _write_all(target: Output, plans: Sequence[ShardPlan], workers: int) -> list[Receipt]:
    receipts: dict[int, Receipt] = {}
    with Progress(len(plans), "writing shards", "shard") as bar:
        for number, receipt in parallel.run(write_shard, plans, workers):
            receipts[number] = receipt
            bar.advance()
    for receipt in receipts.values():
        if target.size(receipt.info.name) != receipt.info.bytes:
            raise ShardError(
                f"{receipt.info.name} was written, but this machine does not find it in {target.folder}: on a "
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


def _check_same(index: ShardIndex, folder: PlannedFolder) -> None:
    """Raise ShardError if a finished folder does not hold these annotations and images."""
    plans = folder.plans
    same = (
        index.source_digest == folder.source.digest
        and index.samples.length.tolist() == [file.stored_length for plan in plans for _, file in plan.samples]
        and index.samples.json_length.tolist() == [len(image.record) for plan in plans for image, _ in plan.samples]
        and [shard.samples for shard in index.shards] == [len(plan.samples) for plan in plans]
    )
    if not same:
        raise ShardError(
            f"{index.folder} already holds another data set or was built with other flags ({index.digest[:12]}); "
            "delete it or give a new folder"
        )
