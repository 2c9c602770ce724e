"""What `--dry-run` prints: the config and the plan of a run: steps, batch arithmetic, shards per rank, time, memory.

Raises the InputErrors that `driver.train` would raise before it starts Ray.
"""

from pipeline.config import Config, dump_yaml
from pipeline.config.augment import describe_augmentation
from pipeline.data.plan import eval_plan, max_open_shards
from pipeline.data.transforms import evaluation_views
from pipeline.engine.batching import batch_arithmetic
from pipeline.engine.stage import resolve_stage
from pipeline.launch.preflight import GIB, CheckedRun, ModelSize, check_run
from pipeline.launch.resume_check import Resume
from pipeline.launch.run_warnings import run_warnings
from pipeline.launch.sizing.auto import with_numbers
from pipeline.launch.sizing.steps import length_of


def preview(config: Config, resume: Resume = "no", probe: bool = False) -> str:
    """The config as it was given, its `auto` as numbers, and the plan; with `probe` two steps are measured.

    Raises:
        InputError: the run cannot start.
        MemoryFullError: the two steps do not fit.
    """
    checked = check_run(config, resume)
    numbers = checked.config
    config = with_numbers(config, numbers.model.num_classes, numbers.train.micro_batch)
    text = f"{dump_yaml(config)}\n{plan_of(checked)}"
    if not probe:
        return text
    from pipeline.launch.sizing.estimate import describe
    from pipeline.launch.sizing.probe import measure_run

    return f"{text}\nprobe       {describe(numbers, measure_run(checked))}"


def plan_of(checked: CheckedRun) -> str:
    """The plan of a run as text."""
    from pipeline.evaluation.tta import eval_sizes_of  # these load torch
    from pipeline.launch.sizing.estimate import describe_run

    config, train_index, val_index = checked.config, checked.train, checked.val
    train, world = config.train, config.scaling.num_workers
    length = length_of(config, train_index)
    eval_sizes, mix = eval_sizes_of(config.evaluation, config.data.augment), config.data.mix_shards
    sizes = evaluation_views(val_index.sizes(), eval_sizes[0]).out_size
    evaluation = config.evaluation
    groups = eval_plan(sizes, val_index.samples.shard, evaluation.micro_batch, mix, evaluation.max_images)
    eval_groups, eval_images = len(groups), sum(map(len, groups))
    span = max(config.data.window, train.global_batch)
    at_once = max_open_shards(len(train_index), len(train_index.shards), mix, span)
    lines = [
        f"data        train {len(train_index.samples)} images in {len(train_index.shards)} shards, "
        f"val {len(val_index.samples)} in {len(val_index.shards)}; {len(train_index.categories)} categories",
        f"augment     {describe_augmentation(config.data.augment)}",
        *[
            f"balance     {length.samples} samples per epoch instead of {len(train_index)}: images of classes in "
            f"less than {100 * config.data.balance:g}% of them are repeated"
        ]
        * bool(config.data.balance),
        f"steps       {length.per_epoch} per epoch x {train.epochs} epochs = {length.total} optimizer steps",
        f"batch       {batch_arithmetic(train, world)}",
        f"reading     every rank reads single samples, {length.total * train.global_batch // world} in all, from at "
        f"most {at_once} of {len(train_index.shards)} shards at a time",
        f"evaluation  {f'only {eval_images} images, ' if eval_images < len(val_index.samples) else ''}"
        f"{eval_groups} groups, at most {-(-eval_groups // world)} per rank, every "
        f"{train.eval_epochs} epochs" + (f", each group in {len(eval_sizes)} views" if len(eval_sizes) > 1 else ""),
        f"memory      {_memory(config, checked.size)}",
        f"estimate    {describe_run(checked)}",
        f"tracking    {checked.store.uri} ({checked.store.knob}), experiment {config.tracking.experiment}",
        f"disk        {checked.size.checkpoint_bytes / GIB:.2f} GiB per checkpoint in {config.storage}/{config.name}",
    ]
    lines += [f"warning     {warning}" for warning in run_warnings(checked)]
    return "\n".join(lines)


def _memory(config: Config, size: ModelSize) -> str:
    """The memory that one rank needs for the weights. Activations depend on the image size and are not counted."""
    from pipeline.launch.sizing.estimate import state_bytes

    stage, need = resolve_stage(config.train, size.trained), state_bytes(config, size) / GIB
    parts = "weights, gradients, moments and average" if config.train.ema_decay else "weights, gradients and moments"
    return (
        f"{size.trained:,} trainable of {size.parameters:,} parameters; {need:.2f} GiB per rank for {parts} "
        f"(ZeRO {stage}{', moments in host memory' if config.train.offload_optimizer else ''}), activations not counted"
    )
