"""Which of MLflow's runs followed a preset's recipe, under whatever name, and the AP they reached. For `jobs.table`.

It fails with TrackingError where MLflow does not answer, and with ConfigError for an address that is none.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, flatten, recipe
from pipeline.mlflow_client import connect
from pipeline.tracking import as_params

METRIC = "val/AP"
PAGE = 1000  # runs per request


@dataclass(frozen=True)
class TrainedRun:
    """A finished run."""

    name: str
    run_id: str
    ap: float  # percent, of its last evaluation


def find_trained(tracking_uri: str, presets: Mapping[str, Config]) -> dict[str, TrainedRun]:
    """The newest finished run of each preset that has one, by the preset's name.

    A run belongs to a preset if all settings agree that the AP depends on (`pipeline.config.compare.RECIPE`); what it
    was trained on cannot be seen. Settings that did not exist when it was trained count as their defaults.
    """
    wanted = {name: as_params(recipe(config)) for name, config in presets.items()}
    defaults = as_params(flatten(Config()))
    found: dict[str, TrainedRun] = {}
    for run in _finished_runs(connect(tracking_uri)):
        if METRIC not in run.data.metrics:
            continue
        params = defaults | run.data.params
        for name, settings in wanted.items():
            if name not in found and settings.items() <= params.items():
                found[name] = TrainedRun(run.info.run_name, run.info.run_id, 100 * run.data.metrics[METRIC])
    return found


def _finished_runs(client: Any) -> Iterator[Any]:
    """Newest first, of all experiments."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    token = None
    while True:
        query = {"filter_string": "attributes.status = 'FINISHED'", "order_by": ["attributes.start_time DESC"]}
        page = client.search_runs(experiments, **query, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
