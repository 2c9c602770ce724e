"""Builds the shards of a whole data set: one folder for each split (`python -m jobs.shard build DATASET OUT`).

Everything is checked before the first byte is written, and the indexes are written when all tars of all splits are
complete. Faults: those of `dataset.read_dataset`, and of `sharding.shards.build_shards`.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.importing.dataset import Dataset, Options, read_dataset
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.sharding.annotations import refusal
from pipeline.data.sharding.orientation import orientation_advice
from pipeline.data.sharding.output import Output
from pipeline.data.sharding.shards import (
    SAMPLES_PER_SHARD,
    PlannedFolder,
    check_numbers,
    plan_shards,
    tar_prefix,
    write_folders,
)
from pipeline.errors import AnnotationError, ConfigError, PipelineError
from pipeline.files.shard_files import is_shard_url
from pipeline.files.storage import join
from pipeline.logs import get_logger

log = get_logger("data.importing")


def build_dataset(
    path: str,
    out: Path | str,
    options: Options,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    mib_per_shard: int | None = None,
    workers: int = 1,
    command: Sequence[str] = (),
) -> dict[str, ShardIndex]:
    """Pack every split of a data set into `OUT/train`, `OUT/val`, `OUT/test`.

    Args:
        path: folder, zip or tar.
        out: folder, or a URL that fsspec can write; finished splits of the same data are not changed.
        options: how the data set is read.
        samples_per_shard: images per tar.
        mib_per_shard: split by size instead: no tar is larger, unless a single sample is.
        workers: tars that are written in parallel; more than 1 run as Ray tasks.
        command: words of the `jobs.lint` command that shows all findings.

    Returns:
        The index of each split.

    Raises:
        AnnotationError: the data set cannot be read, or `rules` refuses it; one message lists all faults.
        ConfigError: the options do not fit it, or `out` is the data set's folder or holds images of it.
        ShardError: an image does not decode, or a folder holds other files or cannot be written.
        ResourceError: more workers than CPUs.
    """
    check_numbers(samples_per_shard, mib_per_shard, workers, options.limit)
    root = str(out) if is_shard_url(str(out)) else os.path.abspath(out)
    Output(root)  # an address that cannot be written is refused before anything is read
    if os.path.realpath(root) == os.path.realpath(path):
        raise _own_folder(str(out))
    found = read_dataset(path, options, workers=workers)
    lint = shlex.join(command or ["python", "-m", "jobs.lint", path])
    log.info("%s", found.describe())
    refuse_dataset(path, found, lint)
    _refuse_folder_of_images(path, str(out), found)
    if kept := sum(count for _, count, _ in found.findings):
        log.info("%s findings that do not stop the build: `%s` shows them", f"{kept:,}", lint)
    folders = []
    for split in found.splits:
        target = Output(join(root, split.name))
        prefix = tar_prefix(split.name, split.source)
        plans = plan_shards(split.samples, prefix, target.folder, samples_per_shard, mib_per_shard)
        folders.append(PlannedFolder(target, split.source, tuple(plans)))
    try:
        write_folders(folders, workers)
    except PipelineError:
        Output(root).remove_empty()
        raise
    return {split.name: load_index(join(root, split.name)) for split in found.splits}


def _refuse_folder_of_images(path: str, out: str, found: Dataset) -> None:
    """Refuse an `out` within the data set that has images of it; a folder of its own there is allowed."""
    data, root = os.path.realpath(path), os.path.realpath(out)
    if is_shard_url(out) or not root.startswith(os.path.join(data, "")):
        return
    folders = {os.path.dirname(file.path) for split in found.splits for _, file in split.samples}
    if any(os.path.join(os.path.realpath(folder), "").startswith(os.path.join(root, "")) for folder in folders):
        raise _own_folder(out)


def _own_folder(out: str) -> ConfigError:
    free = f"{os.path.realpath(out)}-shards"
    return ConfigError(f"OUT {out} holds the data set itself; give a new folder for the shards, such as {free}")


def refuse_dataset(path: str, found: Dataset, lint: str) -> None:
    """Raise AnnotationError if there are findings that a build refuses; `lint` is the command that shows them all."""
    if faults := found.findings.refused():
        advice = orientation_advice([orientation for *_, orientation in found.rotated], found.findings, lint)
        raise AnnotationError(refusal(path, lint, [*faults, *advice]))
