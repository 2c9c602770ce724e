"""The best trial of a sweep as a registered model, by the same way as `jobs.register`."""

from pipeline.config import Config
from pipeline.config.names import check_model_name
from pipeline.errors import RunError
from pipeline.files.storage import join
from pipeline.runs.record import read_run
from tune.results.outcomes import best
from tune.results.source import Results

ALIAS = "challenger"


def choose_model_name(given: str, base: Config) -> str:
    """The name of the model: `given`, else the config's `tracking.register_as`, else the sweep's name.

    Raises:
        RunError: MLflow would not accept it.
    """
    name = given or base.tracking.register_as or base.name
    try:
        check_model_name(name)
    except ValueError as error:
        raise RunError(f"--register: {error}; give another one with --register=NAME") from None
    return name


def register_best(results: Results, name: str = "", tracking_uri: str | None = None) -> tuple[str, str]:
    """Register the best trial's best checkpoint with the alias `challenger`; returns the model's name and version.

    Of repeats it is the best one of the best point.

    Args:
        results: of the sweep.
        name: see `choose_model_name`.
        tracking_uri: `--tracking-uri`; by default the trial's own store.

    Raises:
        SweepError: all trials failed or have no score.
        RunError: the best trial has no checkpoint, or MLflow does not accept the name.
        TrackingError: MLflow does not answer or refuses.
    """
    from pipeline.registry.register import register  # loads PyTorch and MLflow

    model = choose_model_name(name, results.space.base)
    trials = results.trials_of(best(results.outcomes))
    trial = max(trials, key=lambda each: results.ledger.score(each.name) or 0.0)
    return model, register(read_run(join(results.folder, trial.name)), model, ALIAS, tracking_uri)
