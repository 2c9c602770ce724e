"""Scoring of one checkpoint beside the training, in the process of an evaluation task (`task.py`).

Groups, weights (the average, if the run keeps one) and arithmetic are those of the inline evaluation, so the AP is the
same. It is logged in the MLflow run; the supervisor has it written into `evaluations.json`. Raises what loading and
evaluation raise; the supervisor turns it into a warning.
"""

import time
from typing import Any

import torch

from pipeline import checkpoint
from pipeline.config import from_dict
from pipeline.engine.cpu_tuning import tune_model
from pipeline.evaluation.evaluator import build_evaluator
from pipeline.evaluation.inline import Reporter, entry_of, is_last
from pipeline.evaluation.verification.request import Place
from pipeline.evaluation.verification.start import settle, start_verification
from pipeline.files.storage import join, local_copy
from pipeline.runs.evaluations import Entry, read_history
from pipeline.runtime import make_deterministic, single
from pipeline.tracking.client import RESTART_SECONDS, leave_retries_to_logger
from pipeline.tracking.logger import RunLogger


def score(config: dict[str, Any], folder: str, run_id: str | None, name: str) -> Entry:
    """Evaluate checkpoint `name` of the run in `folder` (path or URL).

    Args:
        config: the run's config as `dump` gives it, with `use_gpu` resolved.
        folder: the run's.
        run_id: its MLflow run.
        name: the checkpoint's folder.

    Returns:
        Its epoch, step and COCO numbers.

    Raises:
        CheckpointError, ShardError, DetectionError, RunError: it cannot be loaded or scored.
    """
    whole = from_dict(config, "payload")
    if whole.train.deterministic:
        make_deterministic()
    runtime = single("cuda" if whole.scaling.use_gpu is True else "cpu")
    if whole.scaling.use_gpu is not True:
        torch.set_num_threads(max(1, int(whole.scaling.cpus_per_worker)))
    start = time.monotonic()
    with local_copy(join(folder, name)) as local:
        found = checkpoint.load_inference(local)
    model = found.model.to(runtime.device)
    tune_model(model, whole.train, runtime.device)
    evaluator = build_evaluator(whole.data, whole.evaluation, runtime)
    result = evaluator.run(model)
    assert result is not None, "rank 0 gets the result"
    verification = None
    if is_last(found.state, whole.train):
        place = Place(found.state.global_step, folder, run_id or "", whole.tracking.uri)
        verification = start_verification(result.scores, place)
    entry = entry_of(found.state, result.metrics)
    history = (*read_history(folder, found.state.global_step - 1), entry)
    leave_retries_to_logger()
    with RunLogger(whole.tracking.uri, run_id) as logger:
        Reporter(evaluator, logger, folder).write(result, found.state, history, time.monotonic() - start)
        logger.flush(RESTART_SECONDS)
    settle(verification)
    return entry
