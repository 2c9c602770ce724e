"""What is probably not meant in a run that may start: said by `--dry-run` and by the run itself. Nothing here fails."""

from pipeline.engine.batching import recipe_warning
from pipeline.engine.schedule import schedule_warning
from pipeline.engine.stage import stage_warning
from pipeline.launch.preflight import CheckedRun, data_warning
from pipeline.launch.sizing.steps import length_of


def run_warnings(checked: CheckedRun) -> list[str]:
    """The warnings about a run that passed all checks."""
    config = checked.config
    warnings = [
        recipe_warning(config.model, config.optim, config.train),
        schedule_warning(config.optim, config.train.epochs, length_of(config, checked.train).total),
        data_warning(checked.train, checked.val),
        stage_warning(config.train, checked.size.trained),
    ]
    return [warning for warning in warnings if warning]
