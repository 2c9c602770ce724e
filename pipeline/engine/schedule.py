"""A warning about a schedule of learning rates that does not fit the length of the run. Pure; never fails."""

from pipeline.config import OptimConfig


def schedule_warning(optim: OptimConfig, epochs: int, total_steps: int) -> str:
    """What the schedule does not do within the run, and which setting changes that; empty if it does all.

    A run that `train.max_steps` cuts short is a trial of the first steps, so drops that it does not reach are no fault.

    Args:
        optim: `schedule`, `warmup_steps`, `drop_epochs`, `drop_factor`.
        epochs: `train.epochs`.
        total_steps: of the whole run.
    """
    faults = []
    late = [drop for drop in optim.drop_epochs if drop >= epochs]
    if late and optim.schedule == "step" and optim.drop_factor < 1:
        faults.append(
            f"the drop of the learning rates after epoch {', '.join(map(str, late))} (optim.drop_epochs) never comes, "
            f"because train.epochs is {epochs}. Set optim.drop_epochs={_usual_drops(epochs)}"
        )
    if optim.warmup_steps > total_steps:
        faults.append(
            f"the run ends at step {total_steps}, within the warm-up (optim.warmup_steps={optim.warmup_steps}), so the "
            "learning rates never have the values that were set; lower optim.warmup_steps"
        )
    return "; ".join(faults)


def _usual_drops(epochs: int) -> str:
    """Advice on `optim.drop_epochs`: the recipe's 4/5 of the epochs."""
    if epochs == 1:
        return "[], which keeps the rates"
    usual = min(epochs - 1, round(0.8 * epochs))
    return f"[{usual}], after 4/5 of the epochs as in the recipe, or [], which keeps the rates"
