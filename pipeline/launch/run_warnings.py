"""What is probably not meant in a run that may start: said by `--dry-run` and by the run itself. Nothing here fails."""

from pipeline.data.index import ShardIndex
from pipeline.engine.batching import recipe_warning
from pipeline.engine.schedule import schedule_warning
from pipeline.engine.stage import stage_warning
from pipeline.launch.preflight import CheckedRun
from pipeline.launch.sizing.steps import length_of


def run_warnings(checked: CheckedRun) -> list[str]:
    """The warnings about a run that passed all checks."""
    config = checked.config
    warnings = [
        recipe_warning(config.model, config.optim, config.train),
        schedule_warning(config.optim, config.train.epochs, length_of(config, checked.train).total),
        data_warning(checked.train, checked.val),
        box_warning(checked.train, checked.val),
        stage_warning(config.train, checked.size.trained),
    ]
    return [warning for warning in warnings if warning]


def data_warning(train: ShardIndex, val: ShardIndex) -> str:
    """A warning if both splits are made of the same annotations; empty if they are not."""
    if train.digest != val.digest and train.source_digest != val.source_digest:
        return ""
    return (
        "data.train and data.val are made of the same annotations, so AP measures how well the training images are "
        "memorised. Set data.val to shards of other images, unless this is a test of overfitting"
    )


def box_warning(train: ShardIndex, val: ShardIndex) -> str:
    """A warning if a split has no box at all; empty if both have one. `jobs.finetune` refuses such data."""
    faults = []
    if not train.samples.boxes.any():
        faults.append("data.train has no box in any image, so the model learns to detect nothing")
    if not val.samples.boxes.any():
        faults.append("data.val has no box in any image, so no AP can be measured and no checkpoint is the best")
    return "; ".join([*faults, "`python -m jobs.shard info FOLDER` shows what shards hold"]) if faults else ""
