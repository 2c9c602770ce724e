"""The trials of a sweep in Ray Tune: each trial is a whole Ray Train run of `pipeline.launch.driver`.

A trial's driver reserves no CPU, and its workers reserve their own resources when they start. So the sweep must not
start more trials than fit, which `concurrent_trials` counts. The trials' drivers run on the head node, which
autoscalers do not remove. The ledger is the truth; what Tune stores itself is removed at every start. A trial that was
interrupted continues from its own last checkpoint, as `jobs.train --resume=auto` does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError

from pipeline.config import ScalingConfig
from pipeline.csrc.build import build
from pipeline.errors import PreemptedError, ResourceError, SweepError
from pipeline.files import storage
from pipeline.launch import cluster, driver
from pipeline.launch.ray_internals import HEAD_RESOURCE
from pipeline.launch.worker_output import filter_output
from pipeline.logs import get_logger
from tune.search.ledger import Ledger, write_ledger
from tune.space import Space
from tune.trials.adapters import NAME, LedgerCallback, LedgerScheduler, LedgerSearch
from tune.trials.check import CheckedSweep
from tune.trials.lock import WriteLedger
from tune.trials.on_disk import close_ended_runs, take_checkpoint
from tune.trials.state import Sweep

HEAD_SHARE = {HEAD_RESOURCE: 0.001}
ORPHAN_SECONDS = 60.0  # after which Ray has ended the trials of a sweep that was killed
TUNE_FOLDER = "tune"  # of Tune's own files, in the sweep's folder

log = get_logger("sweep")


def prepare(checked: CheckedSweep) -> CheckedSweep:
    """Start Ray and resolve the resources: GPUs, and the number of trials at a time.

    Raises:
        ResourceError: not even one trial fits; nothing was written.
    """
    space, base = checked.space, checked.space.base
    cluster.start_ray()
    base = base.model_copy(update={"scaling": cluster.resolve_gpu(base.scaling)})
    cluster.check_resources(base.scaling)
    build("cuda" if base.scaling.use_gpu else "cpu")  # once, before trials would build it in parallel
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = concurrent_trials(nodes, base.scaling)
    wanted = space.search.concurrent or fit
    if wanted > fit:
        log.info("search.concurrent=%d: %d trials fit into the cluster at a time, the others wait", wanted, fit)
    search = space.search.model_copy(update={"concurrent": min(wanted, fit)})
    return replace(checked, space=replace(space, base=base, search=search))


def run_trials(
    space: Space,
    ledger: Ledger,
    parent_run_id: str | None,
    train: Callable[..., Any] = driver.train,
    write: WriteLedger = write_ledger,
) -> Ledger:
    """Run all trials that are left of a prepared space; returns the ledger at the end.

    Ctrl-C ends the running trials, which then are neither ended nor failed in the ledger.

    Args:
        space: as `prepare` returns it.
        ledger: of what was done before.
        parent_run_id: MLflow run of the sweep.
        train: called by each trial with its config, like `driver.train`.
        write: writes the ledger; a SweepError means that another process runs the sweep.

    Raises:
        PreemptedError: SIGTERM.
        SweepError: Ray ended, a checkpoint cannot be handed over (pbt), or another process runs the sweep.
    """
    folder = space.base.storage
    sweep = Sweep(
        space,
        ledger,
        lambda now: write(folder, now),
        lambda donor, taker: take_checkpoint(storage.join(folder, donor), storage.join(folder, taker)),
    )
    callback = LedgerCallback(sweep)
    storage.remove(storage.join(folder, TUNE_FOLDER))
    trainable = tune.with_parameters(trial, space=space, parent_run_id=parent_run_id, train=train)
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([HEAD_SHARE])),
        tune_config=tune.TuneConfig(
            metric=space.search.metric,
            mode="max",
            num_samples=-1,  # the ledger says when the search is at its end
            scheduler=LedgerScheduler(sweep),
            search_alg=LedgerSearch(sweep),
            trial_name_creator=lambda trial: str(trial.config[NAME]),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(name=TUNE_FOLDER, storage_path=folder, verbose=1, callbacks=[callback]),
    )
    try:
        with filter_output():  # the cause of a failed trial is in the ledger
            if not sweep.is_complete:
                tuner.fit()
    except SystemExit:  # Ray's answer to SIGTERM
        raise PreemptedError("the sweep was stopped; the same command with --resume=auto continues it") from None
    except RayError as error:
        line = next(iter(str(error).splitlines()), "") or repr(error)
        raise SweepError(f"the sweep ended: {line}; the same command with --resume continues it") from error
    finally:
        sweep.save()
        callback.reduce_losing()
        close_ended_runs(sweep.ledger, folder, space.base.tracking.uri)
    return sweep.ledger


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


def trial(values: dict[str, Any], space: Space, parent_run_id: str | None, train: Callable[..., Any]) -> None:
    """Run one trial; Tune calls it in a separate process."""
    from ray.tune.integration.ray_train import TuneReportCallback  # refuses to be used outside a trial

    config = space.config(values["values"], values[NAME], repeat=values["repeat"])
    if "epochs" in values:  # pbt trains in parts
        config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": values["epochs"]})})
    # Tune compares the reports of trials; the result of an evaluation beside the training comes too late for them.
    inline = config.evaluation.model_copy(update={"where": "inline"})
    config = config.model_copy(update={"evaluation": inline})
    callbacks = [TuneReportCallback()]
    train(config, resume="auto", parent_run_id=parent_run_id, callbacks=callbacks, patience=ORPHAN_SECONDS)
