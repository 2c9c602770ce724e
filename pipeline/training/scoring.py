"""One checkpoint scored beside the training: what the task of `validating.py` does, in a process of its own.

The same groups, weights (the average, if the run keeps one) and arithmetic as inline, so the same AP. The result goes
into the MLflow run, into `evaluations.json`, and into the state of the checkpoint, where registry and resume look for
it. Raises what loading, evaluation and storage raise; `validating.py` makes a warning of it.
"""

import time
from typing import Any

import torch

from pipeline import checkpoint
from pipeline.config import from_dict
from pipeline.evaluation.coco import METRICS
from pipeline.evaluation.evaluator import build_evaluator
from pipeline.run_logger import RunLogger
from pipeline.runtime import single
from pipeline.storage import join, local_copy
from pipeline.training.determinism import make_deterministic
from pipeline.training.evaluating import Reporter, with_scores
from pipeline.training.evaluations import Evaluation, add_evaluation, merged, read_evaluations


def score(config: dict[str, Any], folder: str, run_id: str | None, name: str) -> dict[str, float]:
    """Evaluate checkpoint `name` of the run in `folder` (path or URL).

    Args:
        config: the run's config as `dump` gives it, with `use_gpu` resolved.
        folder: the run's.
        run_id: its MLflow run.
        name: the checkpoint's folder.

    Returns:
        The COCO numbers, by the names that Ray's report has: `val/AP`, ...

    Raises:
        CheckpointError, ShardError, DetectionError, RunError: it cannot be loaded or scored, or the result not stored.
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
    evaluator = build_evaluator(whole.data, whole.train, whole.evaluation, runtime)
    result = evaluator.run(found.model.to(runtime.device))
    assert result is not None, "rank 0 gets the result"
    earlier = merged(found.state.history, read_evaluations(folder), found.state.global_step - 1)
    state = with_scores(found.state, result.metrics, earlier)
    with RunLogger(whole.tracking.uri, run_id) as logger:
        Reporter(evaluator, logger).write(result, state, time.monotonic() - start)
    checkpoint.replace_scores(join(folder, name), state)
    add_evaluation(folder, Evaluation(name, state.history[-1]))
    return {f"val/{key}": result.metrics[key] for key in METRICS}
