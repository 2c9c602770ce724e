"""The versions of a registered model, and where one of them comes from; what `jobs.models` shows.

A name or version that does not exist is a RunError. A store that does not answer is a TrackingError. What is missing of
a version, such as a deleted run, is shown as missing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.data.sharding.diff import diff_shards
from pipeline.errors import ShardError
from pipeline.evaluation.summary import METRICS
from pipeline.registry.aliases import CHAMPION
from pipeline.registry.kept_results import list_results
from pipeline.registry.register import CHECKPOINT_TAG, find_model, list_registered
from pipeline.registry.versions import (
    COMMIT_TAG,
    FOLDER_TAG,
    USER_TAG,
    Version,
    changed_settings,
    describe_version,
    list_versions,
    read_version,
    size_of,
)
from pipeline.tracking.client import connect, mlflow_faults
from pipeline.tracking.run import STATUS_TAG
from pipeline.tracking.store import TrackingStore

SHOWN_METRICS = ("AP", "AP50", "AP_small")
PROMOTION = "promotion/"  # before the tags of a promotion

Tree = dict[str, Any]


@dataclass(frozen=True)
class ModelRow:
    """A registered model."""

    name: str
    versions: int
    aliases: Mapping[str, str]  # version by alias


def list_models(store: TrackingStore) -> list[ModelRow]:
    """All registered models by name."""
    client = connect(store)
    with mlflow_faults(store, "did not list its models"):
        return [
            ModelRow(
                model.name,
                len(list_versions(client, model)),
                {alias: str(version) for alias, version in sorted(model.aliases.items())},
            )
            for model in list_registered(client)
        ]


def list_rows(store: TrackingStore, name: str) -> list[Tree]:
    """The versions of a model, newest first, as JSON types; the settings are those that differ from the champion's."""
    client = connect(store)
    with mlflow_faults(store, f"did not list the versions of {name}"):
        model = find_model(client, name)
        versions = [describe_version(client, model, found) for found in list_versions(client, model)]
        champion = next((each for each in versions if CHAMPION in each.aliases), None)
        return [_row(each, champion, size_of(client, store, each)) for each in versions]


def trace(store: TrackingStore, name: str, which: str, against: str | None) -> Tree:
    """Where a version comes from, as JSON types.

    Args:
        store: of MLflow.
        name: registered model.
        which: number or alias of the version.
        against: of another one, whose settings and data are compared; by default the settings of the champion.
    """
    client = connect(store)
    with mlflow_faults(store, f"did not describe {name}"):
        model = find_model(client, name)
        version = read_version(client, model, which)
        tree = _lineage(version) | {
            "bytes": size_of(client, store, version),
            "promotion_results": list_results(client, version),
        }
        other = against or (CHAMPION if CHAMPION in model.aliases else None)
        if other is None:
            return tree
        compared = read_version(client, model, other)
    if compared.number == version.number:
        return tree
    tree["against"] = {"version": compared.number, "settings": _changes(compared, version)}
    if against:
        tree["against"]["data"] = {split: _data_differences(split, compared, version) for split in ("train", "val")}
    return tree


def _row(version: Version, champion: Version | None, size: int | None) -> Tree:
    differs = {} if champion is None or champion.number == version.number else _changes(champion, version)
    return {
        "version": version.number,
        "aliases": list(version.aliases),
        **{name: version.metric(f"val/{name}") for name in SHOWN_METRICS},
        "data_digest": version.tags.get("data_digest"),
        "val_digest": version.val_digest or None,
        "differs_from_champion": differs,
        "run": version.tags.get("run"),
        "bytes": size,
        "created": version.created.isoformat(timespec="seconds"),
        "promotion": version.tags.get(f"{PROMOTION}verdict"),
    }


def _lineage(version: Version) -> Tree:
    tags, run = version.tags, version.run
    splits = sorted({key.partition("/")[0] for key in tags if key.partition("/")[2] in METRICS})
    source: Mapping[str, str] = run.data.tags if run else {}
    return {
        "model": version.name,
        "version": version.number,
        "aliases": list(version.aliases),
        "created": version.created.isoformat(timespec="seconds"),
        "checkpoint_sha256": tags.get(CHECKPOINT_TAG),
        "step": tags.get("step"),
        "run": {
            "name": tags.get("run"),
            "id": run.info.run_id if run else None,
            "deleted": run is None or run.info.lifecycle_stage != "active",
            "folder": tags.get(FOLDER_TAG),
            "status": source.get(STATUS_TAG),
            "user": source.get(USER_TAG),
        },
        "git_commit": source.get(COMMIT_TAG),
        "data_digest": tags.get("data_digest"),
        "val_digest": version.val_digest or None,
        "data": {split: asdict(each) for split, each in version.data.items()},
        "evaluations": {
            split: {name: version.metric(f"{split}/{name}") for name in METRICS if f"{split}/{name}" in tags}
            for split in splits
        },
        "promotion": {key.removeprefix(PROMOTION): tags[key] for key in sorted(tags) if key.startswith(PROMOTION)},
        "settings": dict(sorted(version.settings.items())),
    }


def _changes(old: Version, new: Version) -> dict[str, list[str | None]]:
    return {key: list(pair) for key, pair in changed_settings(old, new).items()}


def _data_differences(split: str, old: Version, new: Version) -> list[str]:
    """What `jobs.shard diff` says of the data of two versions; empty if they are the same."""
    before, now = old.data.get(split), new.data.get(split)
    if before and now and before.digest == now.digest:
        return []
    folders = [
        each.folder if each else version.settings.get(f"data.{split}", "")
        for each, version in ((before, old), (now, new))
    ]
    if not all(folders):
        return ["not known: a run names no folder"]
    try:
        return diff_shards(*folders)
    except ShardError as error:
        return [f"not compared: {error}"]
