"""MLflow runs: the driver creates or continues a run and closes it; `logger.py` writes into it by run id.

Only `MlflowClient` is used, never MLflow's process-wide active run. If MLflow does not answer, starting and closing a
run warn once within seconds, and training continues. If MLflow refuses the request, that is an InputError: training
would not be logged at all, so it does not start.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.config import Config, TrackingConfig, flatten
from pipeline.data.index import ShardIndex
from pipeline.errors import InputError, TrackingError, TrackingInputError
from pipeline.files.sqlite_uri import sqlite_file
from pipeline.logs import get_logger
from pipeline.tracking.api import Experiment, Run, TrackingClient
from pipeline.tracking.client import call_within, connect, mlflow_faults, text_of
from pipeline.tracking.database import check_new_database
from pipeline.tracking.lineage import log_data, source_tags
from pipeline.tracking.store import SETTING, TrackingStore, resolve_uri

BATCH_PARAMS = 100  # MLflow's limit for one request
STATUS_TAG = "run_status"
RESUME_TAG = "resumed_with"
PARENT_TAG = "mlflow.parentRunId"
CHECK_SECONDS = 20.0  # longest wait for the check of a store

logger = get_logger("tracking")


def check_experiment(store: TrackingStore, name: str) -> None:
    """Refuse an experiment or a store that MLflow would refuse when the run starts; nothing is written.

    Args:
        store: the store of the run.
        name: `tracking.experiment`.

    Raises:
        InputError: the experiment is deleted, or the store cannot be used as it is.
    """
    database = sqlite_file(store.uri)
    if database is not None and not database.exists():
        check_new_database(database, store.knob)  # it is created when the run starts
        return

    def check() -> None:
        with mlflow_faults(store, f"refuses tracking.experiment={name}"):
            _find_experiment(connect(store, create=True), name)

    try:
        call_within(check, CHECK_SECONDS)
    except InputError:
        raise
    except TrackingError:
        pass  # an outage; `start_run` warns of it


def start_run(
    tracking: TrackingConfig,
    config: Config,
    name: str,
    *,
    resume_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    parent_run_id: str | None = None,
    knob: str = SETTING,
    data: Mapping[str, ShardIndex] | None = None,
) -> str | None:
    """Create the MLflow run of a training run, or reopen its old one. Only the driver calls it.

    A new run gets the flattened config as parameters, once. A continued run keeps its parameters, which MLflow does
    not allow to change; settings that differ are written to a tag, see `resume_tags`.

    Args:
        tracking: with the chosen store as its `uri`.
        config: the whole run.
        name: of the MLflow run.
        resume_run_id: the run to reopen.
        tags: further tags.
        parent_run_id: MLflow run of the sweep.
        knob: the setting or flag that named the store, for messages.
        data: the shard folders of `train` and `val`, which are logged as the data sets of a new run.

    Returns:
        The run id, or None (and one warning) if MLflow does not answer.

    Raises:
        InputError: MLflow refuses: a wrong address, a deleted experiment, a wrong login, a damaged database.
    """
    store = TrackingStore(resolve_uri(tracking.uri, knob), knob)
    params = as_params(flatten(config))

    def start() -> str:
        client = connect(store, create=True)
        if resume_run_id is not None and _reopen(client, resume_run_id, params, tags or {}):
            return resume_run_id
        parent = {PARENT_TAG: parent_run_id} if parent_run_id else {}
        all_tags = {**source_tags(), **(tags or {}), STATUS_TAG: "RUNNING", **parent}
        run = client.create_run(_experiment(client, store.uri, tracking.experiment), tags=all_tags, run_name=name)
        _log_params(client, run.info.run_id, params)
        log_data(client, run.info.run_id, data or {})
        return str(run.info.run_id)

    try:
        with mlflow_faults(store, "took no run"):
            return call_within(start)
    except InputError:
        raise
    except Exception as error:
        logger.warning("training continues without MLflow: %s", text_of(error))
        return None


def as_params(values: Mapping[str, Any]) -> dict[str, str]:
    """Flattened settings as MLflow's parameters: text unchanged, everything else as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def finish_run(uri: str, run_id: str | None, status: str) -> None:
    """Close a run as FINISHED, FAILED, KILLED or PREEMPTED; a failure is a warning. Without a run id it does nothing.

    MLflow has no status for a run that stopped early. It is KILLED there, and the tag `run_status` says PREEMPTED.
    """
    if run_id is None:
        return

    def close() -> None:
        client = connect(uri)
        client.set_tag(run_id, STATUS_TAG, status)
        client.set_terminated(run_id, "KILLED" if status == "PREEMPTED" else status)

    try:
        call_within(close)
    except Exception as error:
        logger.warning("MLflow run %s could not be closed as %s: %s", run_id, status, text_of(error))


def _reopen(client: TrackingClient, run_id: str, params: dict[str, str], tags: Mapping[str, str]) -> bool:
    """Set an existing run to RUNNING; False (and a warning) if the store does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage != "active":
        logger.warning("MLflow run %s no longer exists; the resumed training gets a new one", run_id)
        return False
    known = run.data.params
    changed = {key: value for key, value in params.items() if known.get(key) != value}
    if not known:  # the first start failed before its parameters were written
        _log_params(client, run_id, params)
    else:
        tags = {**tags, **resume_tags(run.data.tags, changed)}
    for key, value in {**tags, STATUS_TAG: "RUNNING"}.items():
        client.set_tag(run_id, key, value)
    client.update_run(run_id, status="RUNNING")
    return True


def resume_tags(tags: Mapping[str, str], changed: dict[str, str]) -> dict[str, str]:
    """The tag for the settings that a run is resumed with; none if they are those of its last start.

    Each resume with other settings has its own tag: `resumed_with.1`, `resumed_with.2` and so on. An empty tag means
    the settings of the first start. Version 0.1 had a single tag, `resumed_with`, which stays.

    Args:
        tags: of the MLflow run.
        changed: settings that differ from the run's parameters, as MLflow has them.
    """
    last, before = _last_resume(tags)
    return {} if before == changed else {f"{RESUME_TAG}.{last + 1}": json.dumps(changed, sort_keys=True)}


def settings_of(run: Run) -> dict[str, str]:
    """The settings of a run's last start, as MLflow has them."""
    return {**run.data.params, **_last_resume(run.data.tags)[1]}


def _last_resume(tags: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    """Number and settings of the newest tag of `resume_tags`; no settings if the tag is not of this project's form."""
    numbers = [int(key.removeprefix(f"{RESUME_TAG}.")) for key in tags if re.fullmatch(rf"{RESUME_TAG}\.\d+", key)]
    last = max(numbers, default=0)
    try:
        found = json.loads(tags.get(f"{RESUME_TAG}.{last}" if last else RESUME_TAG, "{}"))
    except ValueError:
        found = None
    return last, {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _experiment(client: TrackingClient, uri: str, name: str) -> str:
    """The experiment's id. On SQLite its files are stored beside the database, not in the current folder."""
    experiment = _find_experiment(client, name)
    if experiment is not None:
        return str(experiment.experiment_id)
    from mlflow.exceptions import MlflowException

    database = sqlite_file(uri)
    location = (database.parent / "mlartifacts").as_uri() if database else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException as error:  # another run has created it meanwhile
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or (experiment := _find_experiment(client, name)) is None:
            raise
        return str(experiment.experiment_id)


def _find_experiment(client: TrackingClient, name: str) -> Experiment | None:
    """The experiment of this name, None if there is none. Raises TrackingInputError if it is deleted."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise TrackingInputError(
            f"tracking.experiment: {name} is deleted in MLflow; restore it with `mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}`, or give another name"
        )
    return experiment


def _log_params(client: TrackingClient, run_id: str, params: dict[str, str]) -> None:
    from mlflow.entities import Param

    rows = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(rows), BATCH_PARAMS):
        client.log_batch(run_id, params=rows[start : start + BATCH_PARAMS])
