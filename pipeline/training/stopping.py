"""Leaving early: who may ask a run to stop, how its ranks agree on the step, and how the driver asks.

A run is asked by SIGTERM or Ctrl-C at the driver (which rings a `Bell`), by SIGTERM at a worker, or by Ray's notice
that a node is taken away. Each rank says in its step's all-reduce whether it was asked (`Engine.train_step(stop=...)`),
so all of them leave after the same step, with a checkpoint. Used by `worker.py` and `driver.py`.
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
POLL_SECONDS = 0.5  # between two looks at the bell
NOTICE_STEPS = 20  # between two questions for Ray's notice, which wait for all ranks
TERMINATED = "a worker got SIGTERM"
NOTICE = "a node is taken away"


class Bell:
    """Between driver and rank 0, an actor on the driver's node: it is rung to stop the run, and told its progress.

    It alone writes `evaluations.json` of the run in `folder`.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._rows: list[Evaluation] = []  # of this start
        self._reason = ""
        self._line = ""
        self._kept: list[str] = []

    def ring(self, reason: str) -> None:
        """Ask the run to stop."""
        self._reason = self._reason or reason

    def reason(self) -> str:
        """Why it was rung, or an empty string."""
        return self._reason

    def tell(self, line: str, keep: bool = False) -> None:
        """Say how far the run is; `keep` for a line that later ones do not replace."""
        if keep:
            self._kept.append(line)
        else:
            self._line = line

    def evaluated(self, row: Evaluation) -> None:
        """Write a row, with those that could not be written before. Raises RunError, OSError."""
        self._rows.append(row)
        self.tell(outcome(row.entry), keep=True)
        write_evaluations(self._folder, [*read_evaluations(self._folder), *self._rows])

    def told(self) -> tuple[list[str], str]:
        """Lines to keep that were told since the last call, and the newest of the others."""
        kept, self._kept = self._kept, []
        return kept, self._line


def hang_bell(folder: str) -> Any:
    """A handle of a new Bell of the run in `folder`; it lives as long as the driver keeps it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 3, "scheduling_strategy": here}
    return ray.remote(**options)(Bell).remote(folder)


class InterruptibleTorch(TorchConfig):
    """Ray's set-up of the process group, through the interface that Ray uses, and SIGTERM at a worker as a wish.

    Signal handlers can be set in a process's main thread only, and the training function runs in another one.
    """

    @property
    def backend_cls(self) -> type:
        """Ray's backend with one more thing to do on each worker."""
        base = super().backend_cls

        class Backend(base):  # type: ignore[misc, valid-type]  # Ray chooses the base
            def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
                worker_group.execute(choose_interface)
                super().on_start(worker_group, backend_config)

            def on_training_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
                super().on_training_start(worker_group, backend_config)
                worker_group.execute(catch_sigterm)

        return Backend


_terminated = threading.Event()  # signals belong to the process, and so does this


def catch_sigterm() -> None:
    """From now on SIGTERM is remembered; the second one ends the process as it would have before."""

    def remember(number: int, frame: object) -> None:
        _terminated.set()
        signal.signal(signal.SIGTERM, previous)

    _terminated.clear()
    previous = signal.signal(signal.SIGTERM, remember)


class StopWatch:
    """Collects on one rank who has asked the run to stop.

    Args:
        bell: what the driver rings; only rank 0 listens.
        rank: this rank.
        elastic: the run can go on with fewer workers. Ray's notice then asks for a checkpoint, not for an end: Ray
            itself starts the workers again on what is left when the node is gone.
    """

    def __init__(self, bell: Any | None, rank: int, elastic: bool) -> None:
        self._reason = ""
        self._elastic = elastic
        self._notice: ray.train.PreemptionInfo | None = None
        self._save = False
        if bell is not None and rank == 0:
            threading.Thread(target=self._listen, args=(bell,), name="bell", daemon=True).start()

    def asked(self, step: int) -> bool:
        """Whether this rank wants to leave after `step`; all ranks must call it with the same steps."""
        if step % NOTICE_STEPS == 0:
            notice = ray.train.get_preemption_info()  # the same on all ranks
            if notice is not None and not self._elastic:
                self._reason = self._reason or NOTICE
            self._save = notice is not None and notice != self._notice
            self._notice = notice
        return bool(self.reason)

    def wants_checkpoint(self) -> bool:
        """Whether a new notice asks for a checkpoint; True once, and on all ranks after the same step."""
        wanted, self._save = self._save and self._elastic, False
        return wanted

    @property
    def reason(self) -> str:
        """Why, or an empty string if this rank was not asked itself."""
        return self._reason or (TERMINATED if _terminated.is_set() else "")

    def _listen(self, bell: Any) -> None:
        pause = threading.Event()
        while not self._reason:
            try:
                self._reason = self._reason or ray.get(bell.reason.remote(), timeout=60)
            except Exception as error:  # the driver or its node is gone; Ray ends this worker, or nobody rings
                log.info("nobody can ask this run to stop any more: %s", type(error).__name__)
                return
            pause.wait(POLL_SECONDS)
