"""The sweep as Ray Tune runs it: each trial is a whole Ray Train run of `pipeline.launch.driver`.

Used by `tune.sweep`. A trial's driver holds no CPU, and its workers reserve their own resources when they start, so
Tune must not start more trials than fit: `concurrent_trials` counts them. The trials' drivers stay on the head node,
which a cluster does not take away. A trial that fails is an `Outcome` with its error; the others go on.
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
    """Check data, name and resources as a training run does, start Ray; the space with what trials need made fixed.

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
    build("cuda" if base.scaling.use_gpu else "cpu")  # once, not by the first trials side by side
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    concurrent = space.search.concurrent or concurrent_trials(nodes, base.scaling)
    return replace(
        space,
        base=base.model_copy(update={"storage": folder}),
        search=space.search.model_copy(update={"concurrent": concurrent}),
    )


def run_trials(space: Space, parent_run_id: str | None, train: Callable[..., Any] = driver.train) -> list[Outcome]:
    """Run all trials of a prepared space; Ctrl-C ends those that run, whose outcome is then `interrupted`.

    `train` is what a trial does with its config, called like `driver.train`.
    """
    search, diary = space.search, Diary()
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
        run_config=tune.RunConfig(name="tune", storage_path=space.base.storage, verbose=1, callbacks=[diary]),
    )
    with filter_output():  # what made a trial fail stands in its outcome
        results = {Path(result.path).name: result for result in tuner.fit()}
    return [_outcome(space, diary, trial_id, results[trial_id]) for trial_id in diary.started]


class Diary(tune.Callback):
    """Which trials were started, with which values, and which came to an end; Ray's results do not say it of all."""

    def __init__(self) -> None:
        self.started: dict[str, dict[str, Any]] = {}
        self.ended: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note the values."""
        self.started[trial.trial_id] = dict(trial.config)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note the end, also the one that the scheduler decided."""
        self.ended.add(trial.trial_id)


def concurrent_trials(nodes: Sequence[Mapping[str, float]], scaling: ScalingConfig) -> int:
    """How many trials fit into the nodes at a time; a worker cannot be split over nodes.

    Args:
        nodes: each node's resources, e.g. `{"CPU": 8.0, "GPU": 1.0}`.
        scaling: what one trial asks for, with `use_gpu` resolved.

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
    """The axis in Tune's terms."""
    found = axis.domain
    if found.grid is not None:
        return tune.grid_search(list(found.grid))
    if found.choice is not None:
        return tune.choice(list(found.choice))
    draw = tune.uniform if found.uniform else tune.loguniform if found.loguniform else tune.randint
    return draw(*found.bounds)


def scheduler(space: Space) -> TrialScheduler:
    """Who ends weak trials early. No rung lies at the last epoch: a trial that came so far finishes its run."""
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
    """One trial, in a process of its own."""
    from ray.tune.integration.ray_train import TuneReportCallback  # refuses to be used outside a trial

    name = _name(space, tune.get_context().get_trial_id())
    config = space.config(values, name)
    # Tune judges a trial by its reports, for which an evaluation beside the training comes too late
    inline = config.evaluation.model_copy(update={"where": "inline"})
    config = config.model_copy(update={"evaluation": inline})
    train(config, parent_run_id=parent_run_id, callbacks=[TuneReportCallback()])


def _name(space: Space, trial_id: str) -> str:
    return f"{space.base.name}-{trial_id}"


def _outcome(space: Space, diary: Diary, trial_id: str, result: Any) -> Outcome:
    name, metric = _name(space, trial_id), space.search.metric
    status: Status = "failed" if result.error else "stopped early" if trial_id in diary.ended else "interrupted"
    folder = storage.join(space.base.storage, name)
    if run_exists(folder):
        record = read_run(folder)
        if record.status == "FINISHED":
            status = "finished"
        elif record.status == "RUNNING":  # whoever ended the trial left its own driver no last word
            record = replace(record, status="FAILED" if result.error else "KILLED")
            write_run(record)
            finish_run(space.base.tracking.uri, record.run_id, record.status)
    outcome = Outcome(name, diary.started[trial_id], status, error=_text(result.error) if result.error else "")
    history = result.metrics_dataframe
    if history is None or metric not in history:
        return outcome
    scores = history[metric][history[metric] >= 0]  # before its first evaluation a run reports -1
    return replace(outcome, epochs=int(history["epoch"].max()), score=float(scores.max()) if len(scores) else None)


def _text(error: BaseException) -> str:
    return str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
