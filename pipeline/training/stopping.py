"""Stopping early: who may ask a run to stop, how its ranks agree on the step, and how the driver asks.

A run is asked to stop by SIGTERM or Ctrl-C at the driver (through a `ControlChannel`) or by SIGTERM at a worker. Ray's
notice that a node is about to be preempted is such a request, too. Each rank adds its answer to the step's all-reduce
(`Engine.train_step(stop=...)`). So all ranks stop after the same step, with a checkpoint. If the actor or its node is
gone, that is logged and training continues.
"""

import signal
import threading
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.logs import get_logger
from pipeline.runs.evaluations import Evaluation, outcome, read_evaluations, write_evaluations
from pipeline.training.network import choose_interface

log = get_logger("stopping")
POLL_SECONDS = 0.5  # between two questions to the ControlChannel
NOTICE_STEPS = 20  # steps between two questions for Ray's notice; each is a collective
TERMINATED = "a worker got SIGTERM"
NOTICE = "a node is taken away"


class ControlChannel:
    """An actor on the driver's node that carries requests to stop to rank 0, and rank 0's progress to the driver.

    It is also the only writer of `evaluations.json` of the run in `folder`.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._rows: list[Evaluation] = []  # since this start of the driver
        self._reason = ""
        self._line = ""
        self._kept: list[str] = []

    def request_stop(self, reason: str) -> None:
        """Ask the run to stop. The first reason is kept."""
        self._reason = self._reason or reason

    def stop_reason(self) -> str:
        """Why the run was asked to stop, or an empty string."""
        return self._reason

    def post_progress(self, line: str, keep: bool = False) -> None:
        """Set the progress line; a line with `keep` stays, and later lines do not replace it."""
        if keep:
            self._kept.append(line)
        else:
            self._line = line

    def record_evaluation(self, row: Evaluation) -> None:
        """Write a row, with those that could not be written before. Raises RunError, OSError."""
        self._rows.append(row)
        self.post_progress(outcome(row.entry), keep=True)
        write_evaluations(self._folder, [*read_evaluations(self._folder), *self._rows])

    def drain_progress(self) -> tuple[list[str], str]:
        """The kept lines since the last call, and the newest progress line."""
        kept, self._kept = self._kept, []
        return kept, self._line


def start_control_channel(folder: str) -> Any:
    """Start the ControlChannel of the run in `folder`; the actor lives as long as the driver keeps the handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 3, "scheduling_strategy": here}
    return ray.remote(**options)(ControlChannel).remote(folder)


class InterruptibleTorch(TorchConfig):
    """Ray's setup of the process group, with two additions on each worker.

    Ranks talk through the network interface that Ray uses, and SIGTERM becomes a request to stop. The handler needs
    this hook: it can only be set in the main thread, and the training function runs in another one.
    """

    @property
    def backend_cls(self) -> type:
        """Ray's backend, extended by both additions."""
        base = super().backend_cls

        class Backend(base):  # type: ignore[misc, valid-type]  # Ray chooses the base
            def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
                worker_group.execute(choose_interface)
                super().on_start(worker_group, backend_config)

            def on_training_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
                super().on_training_start(worker_group, backend_config)
                worker_group.execute(catch_sigterm)

        return Backend


_terminated = threading.Event()  # one for the process, because signals belong to the process


def catch_sigterm() -> None:
    """Make the first SIGTERM a request to stop; the second one does what SIGTERM did before this call."""

    def remember(number: int, frame: object) -> None:
        _terminated.set()
        signal.signal(signal.SIGTERM, previous)

    _terminated.clear()
    previous = signal.signal(signal.SIGTERM, remember)


class StopMonitor:
    """Collects the requests to stop that reach one rank.

    Args:
        control: handle of the ControlChannel; only rank 0 reads it.
        rank: this rank.
        elastic: whether the run can continue with fewer workers. Then Ray's notice asks for a checkpoint, not for a
            stop: when the node is gone, Ray itself restarts the workers on the remaining nodes.
    """

    def __init__(self, control: Any | None, rank: int, elastic: bool) -> None:
        self._reason = ""
        self._elastic = elastic
        self._notice: ray.train.PreemptionInfo | None = None
        self._save = False
        if control is not None and rank == 0:
            threading.Thread(target=self._listen, args=(control,), name="control", daemon=True).start()

    def should_stop(self, step: int) -> bool:
        """Whether this rank was asked to stop after `step`; all ranks must call it with the same steps."""
        if step % NOTICE_STEPS == 0:
            notice = ray.train.get_preemption_info()  # Ray gives all ranks the same answer
            if notice is not None and not self._elastic:
                self._reason = self._reason or NOTICE
            self._save = notice is not None and notice != self._notice
            self._notice = notice
        return bool(self.reason)

    def wants_checkpoint(self) -> bool:
        """Whether a new notice asks for a checkpoint: True once per notice, on all ranks after the same step."""
        wanted, self._save = self._save and self._elastic, False
        return wanted

    @property
    def reason(self) -> str:
        """Why this rank was asked to stop; empty if it was not (another rank may have been)."""
        return self._reason or (TERMINATED if _terminated.is_set() else "")

    def _listen(self, control: Any) -> None:
        pause = threading.Event()
        while not self._reason:
            try:
                self._reason = self._reason or ray.get(control.stop_reason.remote(), timeout=60)
            except Exception as error:  # the driver or its node is gone; Ray then ends this worker, too
                log.info("the driver cannot be reached, requests to stop are no longer read: %s", type(error).__name__)
                return
            pause.wait(POLL_SECONDS)
