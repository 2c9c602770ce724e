"""Registered models: create a version from a run's checkpoint, and find the checkpoint of `models:/...`.

A version holds the evaluated weights, their checkpoint's state, the `pipeline` package and `pyfunc_model.py`. So
`mlflow.pyfunc.load_model` needs none of this project's files. Aliases name the purpose of a version (`champion`,
`challenger`); stages are not used. A name, alias or run that does not exist is a RunError that lists the existing ones.
A store that does not answer is a TrackingError.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.checkpoint import STATE, TrainState, load_state
from pipeline.config import from_record
from pipeline.config.names import check_model_name, check_new_alias
from pipeline.errors import RunError, TrackingError
from pipeline.files.scratch import scratch_folder
from pipeline.files.storage import local_copy
from pipeline.logs import get_logger
from pipeline.registry.aliases import CHAMPION, move_alias
from pipeline.registry.packaging import save_model
from pipeline.registry.version_files import FILES, NEW_VERSION, file_faults, files_of
from pipeline.runs.evaluations import SUBSET
from pipeline.runs.record import RunRecord
from pipeline.tracking.api import ModelVersion, RegisteredModel, TrackingClient
from pipeline.tracking.client import call_within, connect, load_mlflow, mlflow_faults, text_of
from pipeline.tracking.evaluations import LogTarget
from pipeline.tracking.lineage import LOGGED_MODEL_TAG, link_version, log_model_metrics
from pipeline.tracking.run import finish_run, start_run
from pipeline.tracking.store import TrackingStore, choose_store, with_login

CHECKPOINT_TAG, VAL_DIGEST_TAG = "checkpoint.sha256", "val_digest"  # of a version
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")

log = get_logger("registry")


def register(record: RunRecord, name: str, alias: str, tracking_uri: str | None = None) -> str:
    """Register the run's best (else last) checkpoint as a version of model `name` and point `alias` at it.

    A checkpoint that is registered again under the same name keeps its version.

    Args:
        record: the run, finished or not.
        name: registered model; created if it does not exist.
        alias: e.g. `champion`; moved if another version has it. Empty sets no alias.
        tracking_uri: `--tracking-uri`; by default the run's own store, see `tracking.store`.

    Returns:
        The version's number.

    Raises:
        RunError: no checkpoint yet, or a name or alias that MLflow does not accept.
        CheckpointError: the checkpoint is damaged.
        TrackingError: MLflow does not answer or refuses.
    """
    try:
        check_model_name(name)
        check_new_alias(alias or "none")
    except ValueError as error:
        raise RunError(str(error)) from None
    store = choose_store(tracking_uri, record=record)
    with local_copy(record.checkpoint) as folder:
        state = load_state(folder)
        client = connect(store, create=True)
        with mlflow_faults(store, f"did not register {name}"):
            digest = hashlib.sha256((folder / STATE).read_bytes()).hexdigest()  # the state contains the weights' digest
            found = _find_same(client, store, name, digest)
            found = found or _create_version(client, store, record, name, folder, state, digest)
            if alias:
                _set_alias(client, name, alias, found)
    return found


@contextmanager
def resolve(uri: str, tracking_uri: str | TrackingStore | None) -> Iterator[Path]:
    """The local checkpoint folder of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Files of a server or bucket are downloaded, and removed at the end of the context. `tracking_uri` is a chosen store,
    or `--tracking-uri`.

    Raises:
        RunError: no such model, alias or version; the message lists the existing ones.
        TrackingError: MLflow does not answer.
    """
    store = tracking_uri if isinstance(tracking_uri, TrackingStore) else choose_store(tracking_uri)
    client, name, found = _open_version(uri, store)
    mlflow = load_mlflow()
    with scratch_folder("fetched") as scratch:
        try:
            with file_faults(store, uri):
                source = f"{client.get_model_version_download_uri(name, found.version)}/{FILES}"
                here = urlsplit(source).scheme in ("", "file")  # local files are used without a copy
                copy = None if here else str(scratch)
                download = mlflow.artifacts.download_artifacts
                folder = Path(download(source, dst_path=copy, tracking_uri=with_login(store.uri)))
        except FileNotFoundError as error:
            raise RunError(f"the files of {uri} are gone ({text_of(error)}). {NEW_VERSION}") from error
        if not (folder / STATE).is_file():
            raise RunError(f"{uri} holds no checkpoint ({folder}); was it registered with `python -m jobs.register`?")
        yield folder


def pin_version(uri: str, tracking_uri: str | None) -> tuple[str, str]:
    """`models:/NAME/VERSION` of what `uri` names now, and its store; an alias may move, this does not.

    Raises:
        RunError: no such model, alias or version; the message lists the existing ones.
        TrackingError: MLflow does not answer.
    """
    store = choose_store(tracking_uri)
    _, name, found = _open_version(uri, store)
    return f"models:/{name}/{found.version}", store.uri


def find_log_target(uri: str, tracking_uri: str | None) -> LogTarget:
    """Where MLflow shows evaluations of `models:/NAME@ALIAS` or `models:/NAME/VERSION`. Raises as `resolve`."""
    store = choose_store(tracking_uri)
    _, name, found = _open_version(uri, store)
    if not found.run_id:
        raise RunError(f"{uri} has no MLflow run; register its run with `python -m jobs.register`")
    return LogTarget(store, found.run_id, name, str(found.version), found.tags.get(LOGGED_MODEL_TAG))


def _open_version(uri: str, store: TrackingStore) -> tuple[TrackingClient, str, ModelVersion]:
    """A client, the model's name and its existing version. Raises as `resolve`."""
    parts = MODEL_URI.fullmatch(uri)
    if parts is None:
        raise RunError(f"'{uri}' does not name a model; write models:/NAME@ALIAS or models:/NAME/VERSION")
    client = connect(store)
    with mlflow_faults(store, f"did not find {uri}"):
        found = call_within(
            lambda: find_version(client, find_model(client, parts["name"]), parts["alias"], parts["version"])
        )
    return client, parts["name"], found


def find_model(client: TrackingClient, name: str) -> RegisteredModel:
    """A registered model. Raises RunError if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = ", ".join(model.name for model in list_registered(client)) or "none"
        raise RunError(f"there is no registered model '{name}'; there are: {known}") from None


def list_registered(client: TrackingClient) -> list[RegisteredModel]:
    """All registered models by name."""
    page = client.search_registered_models()
    models = list(page)
    while page.token:
        page = client.search_registered_models(page_token=page.token)
        models += page
    return sorted(models, key=lambda model: model.name)


def find_version(
    client: TrackingClient, model: RegisteredModel, alias: str | None, version: str | None
) -> ModelVersion:
    """A version by its alias or its number. Raises RunError if there is none."""
    name = model.name
    versions = {str(found.version): found for found in versions_of(client, name)}
    number = model.aliases.get(alias) if alias else version
    if number is None or str(number) not in versions:
        aliases = ", ".join(f"@{key} = {value}" for key, value in sorted(model.aliases.items())) or "none"
        wanted = f"alias '{alias}'" if alias else f"version {version}"
        listing = ", ".join(sorted(versions, key=int)) or "none"
        raise RunError(f"model {name} has no {wanted}; versions: {listing}; aliases: {aliases}")
    return versions[str(number)]


def versions_of(client: TrackingClient, name: str) -> list[ModelVersion]:
    """All versions of a model. Another tool may have named it with quotes, which no filter of MLflow can hold."""
    if re.search("['\"]", name):
        return [version for version in client.search_model_versions() if version.name == name]
    return list(client.search_model_versions(f"name='{name}'"))


def _find_same(client: TrackingClient, store: TrackingStore, name: str, digest: str) -> str | None:
    """The newest version of this checkpoint whose files are there."""
    for version in versions_of(client, name):
        number = str(version.version)
        if version.tags.get(CHECKPOINT_TAG) == digest:
            if files_of(client, store, name, number):
                return number
            log.warning("the files of models:/%s/%s are gone; a new version takes its place", name, number)
    return None


def _set_alias(client: TrackingClient, name: str, alias: str, version: str) -> None:
    """Point the alias at the version. That of the version in use can be undone, and the log says what it is worth."""
    while True:
        before = client.get_registered_model(name).aliases.get(alias)
        if alias != CHAMPION or before is None or str(before) == version:
            client.set_registered_model_alias(name, alias, version)
            break
        if move_alias(client, name, alias, version, str(before)) is None:
            break  # else another move was faster, and is undone by this one
    if alias == CHAMPION and str(before) != version:
        log.info("models:/%s@%s is version %s: nothing was compared; jobs.promote does that", name, alias, version)


def _create_version(
    client: TrackingClient,
    store: TrackingStore,
    record: RunRecord,
    name: str,
    folder: Path,
    state: TrainState,
    digest: str,
) -> str:
    """Upload the model and register it; a failure leaves no version."""
    from mlflow.entities import LoggedModelOutput

    run_id = _run_in(client, store, record)
    scores = record.metrics if record.best else {}  # the last checkpoint was not evaluated
    metrics = {key: value for key, value in scores.items() if key.startswith("val/")}
    names = [category.name for category in state.categories]
    tags = {
        **{key: repr(value) for key, value in metrics.items()},
        "run": record.name,
        "run_folder": record.folder,
        "step": str(state.global_step),
        "categories": json.dumps(names),
        "data_digest": state.data_digest,
        CHECKPOINT_TAG: digest,
    }
    if val_digest := record.data.get("val"):
        tags[VAL_DIGEST_TAG] = val_digest
    experiment = client.get_run(run_id).info.experiment_id
    model = client.create_logged_model(
        experiment, name="detector", source_run_id=run_id, tags=tags, model_type="detector"
    )
    try:
        with scratch_folder("register") as scratch:
            save_model(scratch, folder, run_id, model.model_id)
            client.log_model_artifacts(model.model_id, str(scratch / "model"))
        client.finalize_logged_model(model.model_id, "READY")
    except BaseException:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, state.global_step)])
    if metrics:
        log_model_metrics(client, run_id, model.model_id, metrics, state.global_step)
    _ensure_model(client, name)
    version = client.create_model_version(
        name,
        model.artifact_location,
        run_id=run_id,
        model_id=model.model_id,
        tags=tags | {LOGGED_MODEL_TAG: model.model_id},
        description=_describe(record, state, metrics),
    )
    number = _remove_repeated(client, name, model.model_id) or str(version.version)
    link_version(client, model.model_id, name, number)
    log.info("registered %s version %s", name, number)
    return number


def _remove_repeated(client: TrackingClient, name: str, model_id: str) -> str | None:
    """The first version of a logged model, after the removal of others; None if the store lists none.

    MLflow's client sends a request again whose answer is lost, for example because the server was restarted. The
    server has then made two versions of one model.
    """
    from mlflow.exceptions import MlflowException

    found = [v for v in versions_of(client, name) if v.tags.get(LOGGED_MODEL_TAG) == model_id]
    first, *repeated = sorted(int(version.version) for version in found) or [0]
    for number in repeated:
        try:
            client.delete_model_version(name, str(number))
        except MlflowException as error:  # not everybody may delete
            log.warning(
                "version %d of %s is version %d once more and can be deleted: %s", number, name, first, text_of(error)
            )
    return str(first) if first else None


def _run_in(client: TrackingClient, store: TrackingStore, record: RunRecord) -> str:
    """The run's id in this store; a new run if it is deleted, was never logged, or if this is another store."""
    from mlflow.exceptions import MlflowException

    if record.run_id is not None:
        try:
            info = client.get_run(record.run_id).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if info.lifecycle_stage == "active":
                return str(info.run_id)
            log.warning("MLflow run %s of %s is deleted; the version gets a new one", record.run_id, record.name)
    config = from_record(record.config, record.folder)
    tracking = config.tracking.model_copy(update={"uri": store.uri})
    config = config.model_copy(update={"tracking": tracking})
    run_id = start_run(tracking, config, record.name, tags={"run_folder": record.folder}, knob=store.knob)
    if run_id is None:
        raise TrackingError(f"MLflow at {store.uri} took no run for {record.name}; see the warning above")
    finish_run(store.uri, run_id, "FINISHED")
    return run_id


def _ensure_model(client: TrackingClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Deformable DETR; see the versions' tags for AP and classes.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _describe(record: RunRecord, state: TrainState, metrics: dict[str, float]) -> str:
    names = [category.name for category in state.categories]
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    ap = f"AP {metrics['val/AP']:.4f}, AP50 {metrics['val/AP50']:.4f}" if "val/AP50" in metrics else "not evaluated"
    if f"val/{SUBSET}" in metrics:
        ap += f" of only {metrics[f'val/{SUBSET}']:.0f} images (evaluation.max_images)"
    return (
        f"Deformable DETR for {len(names)} classes ({listed}) from run {record.name}, step {state.global_step}: {ap}. "
        "`predict` takes images (files as bytes or base64, Pillow images, RGB arrays) and returns boxes [x, y, "
        "width, height], scores, labels and category_ids of each; params: threshold, top_k, exif (apply or ignore)."
    )
