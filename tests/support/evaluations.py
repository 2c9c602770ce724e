"""Rows of evaluations.json, and their writer without Ray."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from pipeline.runs.evaluations import Evaluation
from pipeline.training.stopping import ControlChannel


def entry(step: float, ap: float = 0.5) -> dict[str, float]:
    return {"epoch": step // 10 - 1, "step": step, "AP": ap, "AP50": 2 * ap}


def row(step: float, ap: float = 0.5) -> Evaluation:
    return Evaluation(f"checkpoint_{step:.0f}", entry(step, ap))


def writer_of(control: ControlChannel) -> Any:
    """The actor's handle, played here."""

    def record_evaluation(row: Evaluation) -> Any:
        answer: Future[None] = Future()
        try:
            answer.set_result(control.record_evaluation(row))
        except Exception as error:
            answer.set_exception(error)
        return SimpleNamespace(future=lambda: answer)

    return SimpleNamespace(record_evaluation=SimpleNamespace(remote=record_evaluation))
