"""What is probably not meant in a run that may start: said by `--dry-run` and by the run itself. Nothing here fails."""

from pipeline.data.balance import epoch_length, read_factors
from pipeline.data.plan import steps_per_epoch
from pipeline.engine.batching import recipe_warning
from pipeline.engine.schedule import schedule_warning
from pipeline.engine.stage import stage_warning
from pipeline.launch.preflight import CheckedRun, data_warning


def run_warnings(checked: CheckedRun) -> list[str]:
    """The warnings about a run that passed all checks."""
    config = checked.config
    _, _, total = count_steps(checked)
    warnings = [
        recipe_warning(config.model, config.optim, config.train),
        schedule_warning(config.optim, config.train.epochs, total),
        data_warning(checked.train, checked.val),
        stage_warning(config.train, checked.size.trained),
    ]
    return [warning for warning in warnings if warning]


def count_steps(checked: CheckedRun) -> tuple[int, int, int]:
    """Samples of an epoch, optimizer steps of an epoch, and optimizer steps of the whole run."""
    data, train = checked.config.data, checked.config.train
    samples = epoch_length(read_factors(data)) if data.balance else len(checked.train)
    steps = steps_per_epoch(samples, train.global_batch, data.tail)
    return samples, steps, min(steps * train.epochs, train.max_steps or steps * train.epochs)
