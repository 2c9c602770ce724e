"""MLflow runs that were trained with a preset's recipe, under any name, and their AP.

Raises TrackingError and ConfigError.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from pipeline.config import Config, flatten, recipe_settings
from pipeline.tracking.api import Page, Run, TrackingClient
from pipeline.tracking.client import call_within, connect, mlflow_faults
from pipeline.tracking.run import as_params
from pipeline.tracking.store import TrackingStore, resolve_uri

METRIC = "val/AP"
PAGE = 1000  # runs per request


@dataclass(frozen=True)
class TrainedRun:
    """A finished run."""

    name: str
    run_id: str
    ap: float  # percent, of its last evaluation


def find_trained(store: TrackingStore | str, presets: Mapping[str, Config]) -> dict[str, TrainedRun]:
    """The newest finished run of each preset that has one, by the preset's name.

    A run belongs to a preset if all settings agree that the AP depends on (`pipeline.config.compare.RECIPE`); what it
    was trained on cannot be seen. Settings that did not exist when it was trained count as their defaults.

    Raises:
        TrackingError: MLflow does not answer, or its database cannot be read.
        ConfigError: the address is not valid.
    """
    store = store if isinstance(store, TrackingStore) else TrackingStore(resolve_uri(store))
    wanted = {name: as_params(recipe_settings(config)) for name, config in presets.items()}
    defaults = as_params(flatten(Config()))
    found: dict[str, TrainedRun] = {}
    for run in _finished_runs(store):
        if METRIC not in run.data.metrics:
            continue
        params = defaults | run.data.params
        for name, settings in wanted.items():
            if name not in found and settings.items() <= params.items():
                found[name] = TrainedRun(run.info.run_name, run.info.run_id, 100 * run.data.metrics[METRIC])
    return found


def _finished_runs(store: TrackingStore) -> list[Run]:
    """Newest first, of all experiments."""
    client, found, token = connect(store), list[Run](), None
    with mlflow_faults(store, "did not list its runs"):
        experiments = [experiment.experiment_id for experiment in call_within(client.search_experiments)]
        while True:
            page = call_within(partial(_page, client, experiments, token))
            found += page
            token = page.token
            if not token:
                return found


def _page(client: TrackingClient, experiments: list[str], token: str | None) -> Page:
    return client.search_runs(
        experiments,
        filter_string="attributes.status = 'FINISHED'",
        max_results=PAGE,
        order_by=["attributes.start_time DESC"],
        page_token=token,
    )
