"""Two real training steps and a few evaluated images in this process: the time and memory of the whole run.

The first step is that of the first epoch, and warms up; the second is the one with the largest pad group. One worker's
share of each is run, without Ray or communication, with plain AdamW, whose state ZeRO would divide. On a CPU the memory
is this process's peak. Memory that runs out is a MemoryFullError with advice.
"""

import math
import resource
import time

import psutil
import torch

from pipeline.config import Config
from pipeline.engine.backend import PlainBackend
from pipeline.engine.cpu_tuning import tune_model
from pipeline.engine.memory import is_out_of_memory, memory_error
from pipeline.engine.module import LossModule
from pipeline.engine.optim import rates_for_batch
from pipeline.engine.step import Engine
from pipeline.evaluation.evaluator import build_evaluator, evaluation_mode
from pipeline.launch.preflight import CheckedRun
from pipeline.launch.sizing.estimate import USABLE, Estimate, available_memory, plan_loader, uses_gpu, work_of
from pipeline.model import Detector, build_criterion, build_model
from pipeline.runtime import Runtime, single

EVAL_IMAGES = 4


def measure_run(checked: CheckedRun) -> Estimate:
    """Measure a run that passed `preflight.check_run`.

    Raises:
        MemoryFullError: it does not fit; the message says what to change.
        ShardError: an image cannot be read.
    """
    on_gpu = uses_gpu(checked.config)
    try:
        return _measure(checked, on_gpu)
    except Exception as error:
        if is_out_of_memory(error):
            raise memory_error(checked.config, on_gpu, error) from error
        raise


def _measure(checked: CheckedRun, on_gpu: bool) -> Estimate:
    config, train = checked.config, checked.config.train
    runtime = single("cuda" if on_gpu else "cpu")
    threads = torch.get_num_threads()
    if not on_gpu:
        torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    torch.manual_seed(config.seed)
    model = build_model(config.model).to(runtime.device)
    tune_model(model, train, runtime.device)
    criterion = build_criterion(config.loss)
    module = LossModule(model, criterion, train.precision, train.cast_weights_once, train.fold_norms)
    optim = rates_for_batch(config.optim, train.global_batch)
    engine = Engine(module, PlainBackend(module, optim, runtime.device, train.precision), runtime, config.seed)
    work = work_of(config, checked.val)
    step = _step_seconds(engine, checked) * work.mean_area
    evaluation = _eval_seconds(model, config, runtime) * work.eval_images / config.scaling.num_workers
    torch.set_num_threads(threads)
    available = available_memory(config, on_gpu) + (0 if on_gpu else USABLE * _held() / config.scaling.num_workers)
    return Estimate(
        step * work.steps, evaluation * work.evaluations, step, _peak(on_gpu), available, on_gpu, measured=True
    )


def _step_seconds(engine: Engine, checked: CheckedRun) -> float:
    """Seconds of one worker's share of a step, per pixel of a padded image; the second step is measured."""
    config, world = checked.config, checked.config.scaling.num_workers
    areas = plan_loader(config).padded_sizes(0).prod(axis=2)
    step, group = divmod(int(areas.argmax()), areas.shape[1])
    seconds = area = 0.0
    for number, (rank, first) in enumerate([(0, 0), (group % world, step)]):
        groups = next(plan_loader(config, rank).epoch(0, first))
        start = time.perf_counter()
        engine.train_step(groups, number)
        seconds = time.perf_counter() - start
        area = sum(math.prod(batch.images.shape[-2:]) for batch in groups) / len(groups)
    return seconds / area


def _eval_seconds(model: Detector, config: Config, runtime: Runtime) -> float:
    """Seconds per evaluated image of one worker."""
    data = config.data.model_copy(update={"workers": 0})
    evaluation = config.evaluation.model_copy(update={"max_images": EVAL_IMAGES})
    evaluator = build_evaluator(data, evaluation, runtime)
    start = time.perf_counter()
    with evaluation_mode(model):
        images = sum(len(found) for found, _ in evaluator.detect(model, evaluator.loader))
    return (time.perf_counter() - start) / max(1, images)


def _peak(on_gpu: bool) -> float:
    """Bytes at the worst moment so far: of the GPU, or of this process."""
    if on_gpu:
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _held() -> float:
    """Bytes that this process holds now, which the workers will be able to use."""
    return float(psutil.Process().memory_info().rss)
