"""Population based training (Jaderberg et al. 2017, arXiv:1711.09846), as pure functions of the space and the ledger.

All trials of the population train `search.grace` epochs, then wait for each other. The worst ones then continue from
the checkpoints of good ones, with changed values, and all train on. So the exchange does not depend on how many trials
run at a time, and a sweep that was killed makes the same ones. Only settings that leave the shapes of the weights as
they are can be searched (`MUTABLE`).
"""

import math
from dataclasses import replace
from typing import Any

from tune.search.ledger import Exchange, Ledger, Trial
from tune.search.sampling import draw_value
from tune.settings import Domain
from tune.space import Space

MUTABLE = ("optim.", "loss.", "train.ema_decay")
RESAMPLE_SHARE = 0.25  # of the changed values are drawn anew
FACTORS = (0.8, 1.2)  # for the others


def boundaries(space: Space) -> tuple[int, ...]:
    """The epochs after which the population waits; none without pbt."""
    epochs, grace = space.base.train.epochs, space.search.grace
    return tuple(range(grace, epochs, grace)) if space.search.early_stop == "pbt" else ()


def target_epochs(space: Space, ledger: Ledger) -> int:
    """The epoch to which the population trains now."""
    return (*boundaries(space), space.base.train.epochs)[ledger.generation]


def exchange(space: Space, ledger: Ledger) -> Ledger:
    """The ledger after the exchange at the present boundary: who takes whose checkpoint, and with which values.

    Args:
        space: with `scheduler: pbt`.
        ledger: all trials that have not failed are paused.
    """
    import numpy as np

    epoch = target_epochs(space, ledger)
    scores = {each.trial: each.score for each in ledger.reports if each.epoch == epoch}
    ranked = sorted(ledger.with_status("paused"), key=lambda trial: scores[trial.name])
    count = min(math.ceil(len(ranked) * space.search.quantile), len(ranked) // 2)
    takers = {trial.name for trial in ranked[:count]}
    trials, made = [], []
    for trial in ledger.trials:
        if trial.name in takers:
            random = np.random.default_rng([space.search.seed, ledger.generation + 1, trial.point])
            donor = ranked[len(ranked) - count + int(random.integers(count))]
            values = {axis.label: _change(axis.domain, donor.values[axis.label], random) for axis in space.axes}
            made.append(Exchange(epoch, trial.name, donor.name, values))
            trial = replace(trial, values=values, takes=donor.name)
        trials.append(replace(trial, status="waiting") if trial.status == "paused" else trial)
    return replace(
        ledger,
        trials=tuple(trials),
        generation=ledger.generation + 1,
        exchanges=(*ledger.exchanges, *made),
    )


def takers(ledger: Ledger) -> list[Trial]:
    """The trials that have not yet got the checkpoint that they continue from."""
    return [trial for trial in ledger.trials if trial.takes]


def _change(domain: Domain, value: Any, random: Any) -> Any:
    """A value drawn anew, or a neighbour: 0.8 or 1.2 times the value, or the one before or after it in the list."""
    anew, up = random.random() < RESAMPLE_SHARE, int(random.integers(2))
    if anew:
        return draw_value(domain, random)
    if domain.values is not None:
        place = domain.values.index(value) + (1 if up else -1)
        return domain.values[min(max(place, 0), len(domain.values) - 1)]
    low, high = domain.bounds
    changed = min(max(value * FACTORS[up], low), high)
    return min(round(changed), int(high) - 1) if domain.randint is not None else changed
