"""Results of evaluating a version, kept in MLflow so that nobody evaluates it twice on the same data.

They are artifacts of the version's run and not a local cache: promotions run on many machines, often on ones that start
empty, and everybody who may promote can read the store. They are beside the model's files and not among them, because
each download of the model would contain them. What an evaluation depends on is its key: the checkpoint's digest, the
digest of the data, the settings and the version of this package.

Kept results that cannot be read, or are not what their record says, count as none. A store that does not take new ones
is a warning.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.checkpoint import STATE
from pipeline.errors import PipelineError
from pipeline.evaluation.detections import Detections, from_results_json
from pipeline.files.scratch import scratch_folder
from pipeline.logs import get_logger
from pipeline.registry.register import CHECKPOINT_TAG
from pipeline.registry.versions import Version
from pipeline.tracking.api import TrackingClient
from pipeline.tracking.client import mlflow_faults
from pipeline.tracking.store import TrackingStore

FOLDER = "promotion/results"  # among the artifacts of the run
RESULTS, RECORD = "results.json", "evaluation.json"
FORMAT = 1

log = get_logger("promotion")


@dataclass(frozen=True)
class EvaluationKey:
    """What the detections of an evaluation depend on."""

    checkpoint: str  # sha256 of its state, which holds the digests of its weights
    data: str  # digest of the shards' index
    settings: Mapping[str, Any]  # of the evaluation, by dotted name
    package: str = __version__

    @property
    def folder(self) -> str:
        """Among the artifacts of the run."""
        text = json.dumps(self.as_tree(), sort_keys=True)
        return f"{FOLDER}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def as_tree(self) -> dict[str, Any]:
        """As JSON types."""
        tree: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **vars(self)}))
        return tree


def checkpoint_digest(folder: Path) -> str:
    """The digest of a checkpoint for a key."""
    return hashlib.sha256((folder / STATE).read_bytes()).hexdigest()


def load_results(
    client: TrackingClient, store: TrackingStore, version: Version, key: EvaluationKey
) -> Detections | None:
    """The detections that were kept for `key`; None if there are none.

    Raises:
        TrackingError: MLflow does not answer.
    """
    if version.run is None:
        return None
    run_id = version.run.info.run_id
    with scratch_folder("results") as scratch, mlflow_faults(store, f"did not give the results of {version.uri}"):
        if {Path(file.path).name for file in client.list_artifacts(run_id, key.folder)} != {RESULTS, RECORD}:
            return None
        folder = Path(client.download_artifacts(run_id, key.folder, str(scratch)))
        try:
            record = json.loads((folder / RECORD).read_bytes())
            content = (folder / RESULTS).read_bytes()
            if record["key"] != key.as_tree() or record["sha256"] != hashlib.sha256(content).hexdigest():
                raise ValueError("they are not what their record says")
            return from_results_json(folder / RESULTS)
        except (PipelineError, OSError, ValueError, TypeError, KeyError) as error:
            log.warning("kept results of %s are not used: %s", version.uri, error)
            return None


def list_results(client: TrackingClient, version: Version) -> list[dict[str, Any]]:
    """The records of all results that were kept of a version: `key`, `sha256`, `metrics`."""
    if version.run is None:
        return []
    run_id, records = version.run.info.run_id, []
    with scratch_folder("results") as scratch:
        for folder in client.list_artifacts(run_id, FOLDER):
            if RECORD not in {Path(file.path).name for file in client.list_artifacts(run_id, folder.path)}:
                continue  # a promotion was killed while it wrote them
            path = client.download_artifacts(run_id, f"{folder.path}/{RECORD}", str(scratch))
            try:
                found = json.loads(Path(path).read_bytes())
                record = {name: found[name] for name in ("key", "sha256", "metrics")}
                if record["key"]["checkpoint"] == version.tags.get(CHECKPOINT_TAG):  # a run may have several versions
                    records.append(record)
            except (ValueError, TypeError, KeyError) as error:
                log.warning("%s of %s is not shown: %s", folder.path, version.uri, error)
    return records


def keep_results(
    client: TrackingClient,
    store: TrackingStore,
    version: Version,
    key: EvaluationKey,
    found: Detections,
    metrics: Mapping[str, float],
) -> None:
    """Keep the detections of an evaluation, and its numbers for readers; a failure is a warning."""
    try:
        if version.run is None:
            raise PipelineError("its MLflow run is deleted")
        with scratch_folder("results") as scratch, mlflow_faults(store, "did not take them"):
            digest = found.to_results_json(scratch / RESULTS)
            record = {"key": key.as_tree(), "sha256": digest, "metrics": dict(metrics)}
            (scratch / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            client.log_artifacts(version.run.info.run_id, str(scratch), key.folder)
    except (PipelineError, OSError) as error:
        log.warning("results of %s are not kept, so the next promotion evaluates it again: %s", version.uri, error)
