"""Packing a COCO-format data set into tar shards with an index; `python -m jobs.shard build` is its command.

The plan comes first: images by ascending id, `samples_per_shard` to a tar. Each tar is then a pure function of its plan
and the picture files, so any number of processes writes the same bytes. A tar is written under `OUT/.build` and renamed
when complete, with a receipt that says what it was made from; a build that is run again keeps the tars whose receipt
and hash still hold. `index.json` comes last and declares the folder complete. Input is checked before the first byte is
written. Faults are AnnotationError (the file, missing pictures), ShardError (a picture, the folder), ResourceError.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import pool
from pipeline.data.annotations import CocoImage, CocoSource, read_coco, summarize, usable_boxes
from pipeline.data.images import MAX_BYTES, check_decodes, extension, open_image
from pipeline.data.index import INDEX, ROW, VERSION, ShardIndex, ShardInfo, encode_index, load_index
from pipeline.data.progress import Progress
from pipeline.data.storage import is_url
from pipeline.errors import AnnotationError, PipelineError, ShardError

BUILD = ".build"  # inside OUT while it is unfinished: half-written tars and receipts
SAMPLES_PER_SHARD = 512  # about 80 MB of COCO
BLOCK = 512  # tar's unit: a header, and what members are padded to
HEAD_BYTES = 64 * 1024  # enough for the header of nearly every picture


@dataclass(frozen=True)
class ShardPlan:
    """Everything a process needs to write one tar. `digest` covers the plan and size and time of the pictures."""

    number: int
    name: str
    out: str
    images: str
    samples: tuple[CocoImage, ...]
    digest: str


@dataclass(frozen=True)
class Receipt:
    """What became of a plan; kept beside the tar until the build is finished."""

    plan: str  # the plan's digest
    info: ShardInfo
    rows: list[list[int]]  # index rows, fields as in index.ROW


def build_shards(
    annotations: Path | str,
    images: Path | str,
    out: Path | str,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    workers: int = 1,
    limit: int | None = None,
) -> ShardIndex:
    """Pack the data set; the same bytes whatever the number of workers, and nothing written if the input is faulty.

    Args:
        annotations: COCO instances JSON.
        images: folder of the pictures that it names.
        out: new or unfinished local folder; a finished one of the same data set is left as it is.
        samples_per_shard: images per tar.
        workers: tars written at a time; more than 1 runs them as Ray tasks (on `RAY_ADDRESS` if set, else locally; on
            a cluster the three paths must be on storage that all nodes see).
        limit: only the first images by id.

    Raises:
        AnnotationError: the annotation file is faulty, or names missing pictures.
        ShardError: a picture is faulty, or `out` holds something else.
        ResourceError: more workers than CPUs.
    """
    source_path, folder, target = Path(annotations), Path(images), Path(out)
    if is_url(str(out)):
        raise ShardError(f"{out} is a URL; build into a local folder and copy it there (the result is read from a URL)")
    if samples_per_shard < 1 or workers < 1 or (limit is not None and limit < 1):
        raise ShardError("--samples-per-shard, --workers and --limit must be at least 1")
    source = read_coco(source_path, limit)
    pictures = _stat_pictures(source_path, folder, source)
    if (target / INDEX).exists():
        return _reuse(target, source, [size for size, _ in pictures], samples_per_shard)
    _check_pictures(folder, source)
    plans = _plan(source, folder, target, pictures, samples_per_shard)
    created = _prepare(target, plans)
    try:
        receipts = _write_all(plans, workers)
    except PipelineError:
        _tidy(target, created)
        raise
    rows = np.array([tuple(row) for receipt in receipts for row in receipt.rows], ROW)
    shards = tuple(receipt.info for receipt in receipts)
    for name, data in encode_index(source.categories, shards, rows, source.digest).items():
        _write_atomically(target, name, data)
    shutil.rmtree(target / BUILD)
    return load_index(str(target))


def write_shard(plan: ShardPlan) -> Receipt:
    """Write one tar (or keep the one that a stopped build finished). Raises ShardError for a faulty picture."""
    out = Path(plan.out)
    kept = _kept(plan)
    if kept is not None:
        return kept
    temporary = out / BUILD / f"{plan.name}.{os.getpid()}"
    try:
        rows = _write_tar(plan, temporary)
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        receipt = Receipt(plan.digest, ShardInfo(plan.name, temporary.stat().st_size, digest, len(plan.samples)), rows)
        # The receipt first: a tar in OUT then always has one, so a later build with another plan can clear it away.
        _write_atomically(out, f"{BUILD}/{plan.name}.json", json.dumps(asdict(receipt)).encode())
        temporary.replace(out / plan.name)
    except OSError as error:  # a full disk, a picture that was just removed
        raise ShardError(f"cannot write {out / plan.name}: {error}; mend that and run the same command again") from None
    finally:
        temporary.unlink(missing_ok=True)
    return receipt


def record(image: CocoImage) -> bytes:
    """The `.json` member of an image: its id and size, and its annotations as they were."""
    content = {"image_id": image.id, "width": image.width, "height": image.height, "annotations": image.annotations}
    return json.dumps(content, separators=(",", ":"), sort_keys=True).encode()


def _write_tar(plan: ShardPlan, path: Path) -> list[list[int]]:
    from webdataset import TarWriter  # imports torch, which planning and verifying do without

    rows, offset = [], 0
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
        for image in plan.samples:
            data = (Path(plan.images) / image.file_name).read_bytes()
            size = (image.height, image.width)
            try:
                kind = extension(data)
                check_decodes(data, size)
            except ShardError as error:
                raise ShardError(f"{Path(plan.images) / image.file_name} {error}") from None
            members = {kind: data, "json": record(image)}
            tar.write({"__key__": f"{image.id:012d}", **members})
            starts = {}
            for name in sorted(members):  # the order in which TarWriter writes them
                starts[name] = offset + BLOCK
                offset += BLOCK + -(-len(members[name]) // BLOCK) * BLOCK
            boxes = len(usable_boxes(image.annotations, size)[0])
            crowds = sum(annotation["iscrowd"] for annotation in image.annotations)
            place = [starts[kind], len(data), starts["json"], len(members["json"])]
            rows.append([image.id, image.width, image.height, boxes, crowds, plan.number, int(kind == "png"), *place])
    return rows


def _stat_pictures(source_path: Path, folder: Path, source: CocoSource) -> list[tuple[int, int]]:
    """(bytes, modification time) of each picture; all missing ones in one error."""
    if not folder.is_dir():
        raise AnnotationError(f"there is no image folder {folder}")
    found, missing, large = [], [], []
    for image in source.images:
        path = folder / image.file_name
        try:
            stat = path.stat()
        except OSError:
            missing.append(image.file_name)
            continue
        if stat.st_size > MAX_BYTES:
            large.append(image.file_name)
        found.append((stat.st_size, stat.st_mtime_ns))
    if missing:
        raise AnnotationError(
            f"{source_path} names pictures that are not in {folder}: {summarize(missing, 'missing file')}"
        )
    if large:
        raise ShardError(
            f"{folder} has files over {MAX_BYTES // 2**20} MiB, {summarize(large, 'file')}; re-encode them"
        )
    return found


def _check_pictures(folder: Path, source: CocoSource) -> None:
    """Compare the header of every picture with its annotation, so that a fault is found before anything is written."""
    faults = []
    with Progress(len(source.images), "checking pictures", "image") as bar:
        for image in source.images:
            path = folder / image.file_name
            try:
                with path.open("rb") as file:
                    head = file.read(HEAD_BYTES)
                    try:
                        open_image(head, (image.height, image.width))
                    except ShardError:  # long metadata can push the header further back
                        open_image(head + file.read(), (image.height, image.width))
            except ShardError as error:
                faults.append(f"{image.file_name} {error}")
            except OSError as error:
                faults.append(f"{image.file_name} cannot be read: {error.strerror}")
            bar.advance()
    if faults:
        raise ShardError(f"{folder}: {summarize(faults, 'faulty picture')}")


def _plan(
    source: CocoSource, folder: Path, target: Path, pictures: list[tuple[int, int]], samples_per_shard: int
) -> list[ShardPlan]:
    # Folder and digest in the name keep the shards of two splits apart in any cache that goes by file names.
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in folder.resolve().name[:80])
    prefix = f"{stem.lstrip('._-') or 'images'}-{source.digest[:8]}"
    plans = []
    for number, start in enumerate(range(0, len(source.images), samples_per_shard)):
        span = slice(start, start + samples_per_shard)
        name = f"{prefix}-{number:06d}.tar"
        content = [VERSION, number, name, [[asdict(image) for image in source.images[span]], pictures[span]]]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        out, images = str(target.resolve()), str(folder.resolve())
        plans.append(ShardPlan(number, name, out, images, source.images[span], digest))
    return plans


def _prepare(target: Path, plans: list[ShardPlan]) -> bool:
    """Make the folder ready, without the tars of a stopped build that was planned differently; True if it is new."""
    try:
        created = not target.exists()
        if not created and any(target.iterdir()) and not (target / BUILD).is_dir():
            raise ShardError(f"{target} is not empty and no unfinished build; give a new folder")
        (target / BUILD).mkdir(parents=True, exist_ok=True)
        for name in {note.stem for note in (target / BUILD).glob("*.tar.json")} - {plan.name for plan in plans}:
            (target / name).unlink(missing_ok=True)
            (target / BUILD / f"{name}.json").unlink()
    except OSError as error:
        raise ShardError(f"cannot write to {target}: {error.strerror}") from None
    return created


def _tidy(target: Path, created: bool) -> None:
    """After a fault, leave nothing behind, unless finished tars can be kept for the next attempt."""
    if not list((target / BUILD).glob("*.json")):
        shutil.rmtree(target if created else target / BUILD)


def _write_all(plans: list[ShardPlan], workers: int) -> list[Receipt]:
    receipts: dict[int, Receipt] = {}
    with Progress(len(plans), "writing shards", "shard") as bar:
        for number, receipt in pool.run(write_shard, plans, workers):
            receipts[number] = receipt
            bar.advance()
    return [receipts[number] for number in range(len(plans))]


def _kept(plan: ShardPlan) -> Receipt | None:
    tar, note = Path(plan.out) / plan.name, Path(plan.out) / BUILD / f"{plan.name}.json"
    if not (tar.is_file() and note.is_file()):
        return None
    try:
        saved: dict[str, Any] = json.loads(note.read_bytes())
        receipt = Receipt(saved["plan"], ShardInfo(**saved["info"]), saved["rows"])
    except (ValueError, KeyError, TypeError):
        return None  # a damaged receipt proves nothing: the tar is written again
    with tar.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return receipt if receipt.plan == plan.digest and receipt.info.sha256 == digest else None


def _reuse(target: Path, source: CocoSource, picture_bytes: list[int], samples_per_shard: int) -> ShardIndex:
    """A finished folder is the result if it holds these annotations and pictures, and an error otherwise."""
    index = load_index(str(target))
    same = (
        index.source_digest == source.digest
        and index.samples.length.tolist() == picture_bytes
        and index.shards[0].samples == min(samples_per_shard, len(source.images))
    )
    if not same:
        raise ShardError(
            f"{target} already holds another data set ({index.digest[:12]}); delete it or give a new folder"
        )
    return index


def _write_atomically(folder: Path, name: str, data: bytes) -> None:
    temporary = folder / BUILD / f"{Path(name).name}.{os.getpid()}.part"
    temporary.write_bytes(data)
    temporary.replace(folder / name)
