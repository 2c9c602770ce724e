"""Writes one tar of a data set from its plan: the work of each process or Ray task of a build.

A tar is a pure function of its plan and the images, so every process would write the same bytes. Each image is
read, compared with its annotation and decoded. The tar gets its name when it is complete. A receipt records its plan; a
later build keeps the tar if receipt and sha256 match. Faults are ShardErrors that name the image.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.images import check_decodes, extension
from pipeline.data.index import ShardInfo
from pipeline.data.sharding.annotations import CocoImage
from pipeline.data.sharding.converted import read_stored
from pipeline.data.sharding.image_files import ImageFile
from pipeline.data.sharding.output import BUILD, Output
from pipeline.data.sharding.rules import SHOWN
from pipeline.data.sharding.summary import Summary
from pipeline.data.sharding.tars import BLOCK, padded_size
from pipeline.errors import ShardError


@dataclass(frozen=True)
class ShardPlan:
    """Everything a process needs to write one tar. `digest` covers the plan and length and stamp of the images."""

    number: int
    name: str
    out: str
    samples: tuple[tuple[CocoImage, ImageFile], ...]
    digest: str


@dataclass(frozen=True)
class Receipt:
    """The result of a plan; stored beside the tar until the build is finished."""

    plan: str  # the plan's digest
    info: ShardInfo
    rows: list[list[int]]  # index rows, fields as in index.ROW
    summary: Summary


def write_shard(plan: ShardPlan) -> Receipt:
    """Write one tar, or reuse the tar that a stopped build finished. Raises ShardError."""
    out = Output(plan.out)
    finished = _find_finished(plan, out)
    if finished is not None:
        return finished
    try:
        with out.scratch(plan.name) as path:
            rows, summary = _write_tar(plan, path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            info = ShardInfo(plan.name, path.stat().st_size, digest, len(plan.samples))
            receipt = Receipt(plan.digest, info, rows, summary)
            content = asdict(receipt) | {"summary": summary.to_json()}
            # The receipt comes first, so that a later build with another plan can find and remove every tar.
            out.write(receipt_name(plan.name), json.dumps(content).encode())
            out.publish(path, plan.name)
    except OSError as error:  # a full disk; a node that does not see the folder
        raise ShardError(
            f"cannot write {plan.name} for {plan.out}: {error}; every node must see the folder; fix that and run the "
            "same command again"
        ) from None
    return receipt


def receipt_name(shard: str) -> str:
    """The name, in the folder, of a tar's receipt."""
    return f"{BUILD}/{shard}.json"


def _write_tar(plan: ShardPlan, path: Path) -> tuple[list[list[int]], Summary]:
    from webdataset import TarWriter  # imports torch, which planning does without

    rows, summary, faults, offset = [], Summary(), [], 0
    with path.open("wb") as target, TarWriter(target, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
        for image, file in plan.samples:
            size = (image.height, image.width)
            try:
                data = read_stored(file)
                kind = extension(data)
                check_decodes(data, image.stored_size)
            except ShardError as error:
                faults.append(f"{image.file_name} {error}")
                continue
            members = {kind: data, "json": image.record}
            tar.write({"__key__": f"{image.id:012d}", **members})
            starts = {}
            for name in sorted(members):  # the order in which TarWriter writes them
                starts[name] = offset + BLOCK
                offset += padded_size(len(members[name]))
            boxes, crowds = summary.add(image.annotations, size, image.orientation)
            offsets = [starts[kind], len(data), starts["json"], len(image.record)]
            rows.append([image.id, image.width, image.height, boxes, crowds, plan.number, int(kind == "png"), *offsets])
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ShardError(
            f"{plan.name} is not written: {'; '.join(faults[:SHOWN])}{more}; `python -m jobs.lint ANNOTATIONS IMAGES` "
            "lists all such images"
        )
    return rows, summary


def _find_finished(plan: ShardPlan, out: Output) -> Receipt | None:
    note = out.read(receipt_name(plan.name))
    if note is None:
        return None
    try:
        saved: dict[str, Any] = json.loads(note)
        info, summary = ShardInfo(**saved["info"]), Summary.from_json(saved["summary"])
        receipt = Receipt(saved["plan"], info, saved["rows"], summary)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # the receipt is damaged: the tar is written again
    if receipt.plan != plan.digest or out.size(plan.name) != info.bytes:
        return None
    return receipt if out.sha256(plan.name) == info.sha256 else None
