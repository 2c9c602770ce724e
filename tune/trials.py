"""The trials of a sweep in Ray Tune: each trial is a whole Ray Train run of `pipeline.launch.driver`.

A trial's driver reserves no CPU, and its workers reserve their own resources when they start. So Tune must not start
more trials than fit, which `concurrent_trials` counts. The trials' drivers run on the head node, which autoscalers do
not remove. A trial that fails is an `Outcome` with its error; the others continue.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from pipeline.config import ScalingConfig
from pipeline.csrc.build import build
from pipeline.errors import ResourceError, RunError
from pipeline.files import storage
from pipeline.launch import cluster, driver, preflight
from pipeline.launch.ray_internals import HEAD_RESOURCE
from pipeline.launch.worker_output import filter_output
from pipeline.runs.record import read_run, run_exists, write_run
from pipeline.tracking.run import finish_run
from tune.report import Outcome, Status
from tune.space import Axis, Space

HEAD_SHARE = {HEAD_RESOURCE: 0.001}


def prepare(space: Space) -> Space:
    """Check data, name and resources as for a training run, and start Ray; returns the space with resolved settings.

    Raises:
        InputError: the sweep cannot start; nothing was written.
    """
    base = preflight.make_paths_absolute(space.base)
    preflight.check_data(base)
    folder = storage.join(base.storage, base.name)
    if storage.exists(folder):
        raise RunError(f"{folder} exists already; choose another name= for the sweep or remove the folder")
    preflight.check_start(base, new=True)
    base = preflight.with_store(base, preflight.check_tracking(base))
    cluster.start_ray()
    base = base.model_copy(update={"scaling": cluster.resolve_gpu(base.scaling)})
    cluster.check_resources(base.scaling)
    build("cuda" if base.scaling.use_gpu else "cpu")  # once, before trials would build it in parallel
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    concurrent = space.search.concurrent or concurrent_trials(nodes, base.scaling)
    return replace(
        space,
        base=base.model_copy(update={"storage": folder}),
        search=space.search.model_copy(update={"concurrent": concurrent}),
    )


def run_trials(space: Space, parent_run_id: str | None, train: Callable[..., Any] = driver.train) -> list[Outcome]:
    """Run all trials of a prepared space. Ctrl-C ends the running trials, whose outcome is then `interrupted`.

    Args:
        space: from `prepare`.
        parent_run_id: MLflow run of the sweep.
        train: called by each trial with its config, like `driver.train`.
    """
    search, trial_log = space.search, TrialLog()
    trainable = tune.with_parameters(trial, space=space, parent_run_id=parent_run_id, train=train)
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([HEAD_SHARE])),
        param_space={axis.label: domain(axis) for axis in space.axes},
        tune_config=tune.TuneConfig(
            metric=search.metric,
            mode="max",
            num_samples=search.draws,
            scheduler=scheduler(space),
            search_alg=BasicVariantGenerator(random_state=search.seed, max_concurrent=search.concurrent or 1),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=space.base.storage, verbose=1, callbacks=[trial_log]),
    )
    with filter_output():  # the cause of a failed trial is in its outcome
        results = {Path(result.path).name: result for result in tuner.fit()}
    return [_outcome(space, trial_log, trial_id, results[trial_id]) for trial_id in trial_log.started]


class TrialLog(tune.Callback):
    """Records which trials started, with their values, and which ended; Ray's results lack this for some trials."""

    def __init__(self) -> None:
        self.started: dict[str, dict[str, Any]] = {}
        self.ended: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the values."""
        self.started[trial.trial_id] = dict(trial.config)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the end, also if the scheduler stopped the trial."""
        self.ended.add(trial.trial_id)


def concurrent_trials(nodes: Sequence[Mapping[str, float]], scaling: ScalingConfig) -> int:
    """The number of trials that the nodes can run at a time; a worker cannot be split over nodes.

    Args:
        nodes: each node's resources, e.g. `{"CPU": 8.0, "GPU": 1.0}`.
        scaling: the resources of one trial, with `use_gpu` resolved.

    Raises:
        ResourceError: not even one trial fits.
    """
    slots = cluster.count_slots(scaling, nodes)
    if slots < scaling.num_workers:
        worker = f"{scaling.cpus_per_worker:g} CPUs" + " and a GPU" * bool(scaling.use_gpu)
        raise ResourceError(
            f"a trial has scaling.num_workers={scaling.num_workers} of {worker} each, the nodes hold {slots}; "
            "lower scaling.num_workers or scaling.cpus_per_worker"
        )
    return slots // scaling.num_workers


def domain(axis: Axis) -> Any:
    """The axis as Tune's search domain."""
    found = axis.domain
    if found.grid is not None:
        return tune.grid_search(list(found.grid))
    if found.choice is not None:
        return tune.choice(list(found.choice))
    sampler = tune.uniform if found.uniform else tune.loguniform if found.loguniform else tune.randint
    return sampler(*found.bounds)


def scheduler(space: Space) -> TrialScheduler:
    """The scheduler that stops weak trials. The last epoch is not a rung, so a trial that reaches it finishes."""
    if space.search.method != "asha":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",
        max_t=space.base.train.epochs - 1,
        grace_period=space.search.grace,
        reduction_factor=space.search.reduction,
        stop_last_trials=False,
    )


def trial(values: dict[str, Any], space: Space, parent_run_id: str | None, train: Callable[..., Any]) -> None:
    """Run one trial; Tune calls it in a separate process."""
    from ray.tune.integration.ray_train import TuneReportCallback  # refuses to be used outside a trial

    name = _name(space, tune.get_context().get_trial_id())
    config = space.config(values, name)
    # Tune compares the reports of trials; the result of an evaluation beside the training comes too late for them.
    inline = config.evaluation.model_copy(update={"where": "inline"})
    config = config.model_copy(update={"evaluation": inline})
    train(config, parent_run_id=parent_run_id, callbacks=[TuneReportCallback()])


def _name(space: Space, trial_id: str) -> str:
    return f"{space.base.name}-{trial_id}"


def _outcome(space: Space, trial_log: TrialLog, trial_id: str, result: Any) -> Outcome:
    name, metric = _name(space, trial_id), space.search.metric
    status: Status = "failed" if result.error else "stopped early" if trial_id in trial_log.ended else "interrupted"
    folder = storage.join(space.base.storage, name)
    if run_exists(folder):
        record = read_run(folder)
        if record.status == "FINISHED":
            status = "finished"
        elif record.status == "RUNNING":  # the trial was ended before its driver could write a status
            record = replace(record, status="FAILED" if result.error else "KILLED")
            write_run(record)
            finish_run(space.base.tracking.uri, record.run_id, record.status)
    outcome = Outcome(name, trial_log.started[trial_id], status, error=_text(result.error) if result.error else "")
    history = result.metrics_dataframe
    if history is None or metric not in history:
        return outcome
    scores = history[metric][history[metric] >= 0]  # before its first evaluation a run reports -1
    return replace(outcome, epochs=int(history["epoch"].max()), score=float(scores.max()) if len(scores) else None)


def _text(error: BaseException) -> str:
    return str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
