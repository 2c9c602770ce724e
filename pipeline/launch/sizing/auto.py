"""Numbers that are `auto`: `model.num_classes` and `train.micro_batch`, chosen at a run's first start and then kept.

The number of classes is that of `data.train`. The pad group is the largest divisor of the batch that gives every worker
one, is within a bound, and whose estimated memory fits into this machine. A run that continues has the numbers of its
record, whatever machine it continues on, because the pad group is part of the arithmetic.
"""

from pipeline.config import Config
from pipeline.data.index import ShardIndex
from pipeline.logs import get_logger

LARGEST_GROUP = {True: 16, False: 4}  # on GPUs, on CPUs: more gain no speed, and pad more

log = get_logger("auto")


def with_recorded(config: Config, recorded: Config | None) -> Config:
    """The config with the numbers of the run that it continues where it says `auto`."""
    if recorded is None:
        return config
    return with_numbers(
        config,
        recorded.model.num_classes if config.model.num_classes == "auto" else config.model.num_classes,
        recorded.train.micro_batch if config.train.micro_batch == "auto" else config.train.micro_batch,
    )


def with_numbers(config: Config, num_classes: int | str, micro_batch: int | str) -> Config:
    """The config with these two settings."""
    model = config.model.model_copy(update={"num_classes": num_classes})
    train = config.train.model_copy(update={"micro_batch": micro_batch})
    return config.model_copy(update={"model": model, "train": train})


def count_classes(config: Config, train: ShardIndex) -> Config:
    """The config with the number of classes of `data.train` if it is `auto`; 91 with `data.labels: raw`."""
    if config.model.num_classes != "auto":
        return config
    classes = 91 if config.data.labels == "raw" else len(train.categories)
    return with_numbers(config, max(1, classes), config.train.micro_batch)


def choose_micro_batch(config: Config, val: ShardIndex) -> Config:
    """The config with a pad group for this machine if it is `auto`; the number of classes must be known."""
    if config.train.micro_batch != "auto":
        return config
    from pipeline.launch.preflight import count_parameters
    from pipeline.launch.sizing.estimate import estimate_run, uses_gpu  # they load torch

    size = count_parameters(config)
    bound = min(LARGEST_GROUP[uses_gpu(config)], max(1, config.train.global_batch // config.scaling.num_workers))
    choices = [number for number in range(bound, 0, -1) if config.train.global_batch % number == 0]
    for number in choices:
        chosen = with_numbers(config, config.model.num_classes, number)
        estimate = estimate_run(chosen, val, size, speed=1.0)  # only its memory is read
        if number == 1 or (estimate is not None and estimate.fits):
            break
    log.info("train.micro_batch: auto is %d on this machine", number)
    return chosen
