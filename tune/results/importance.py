"""The importance of the settings of a sweep: Optuna's PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255).

It compares the values of the best quarter of the points with those of all: a setting is important if the best points
prefer some of its values. Points that were stopped early count too, because only the order of the scores is used. With
few points chance decides, so there must be MIN_POINTS of them.
"""

import logging
import warnings
from dataclasses import dataclass, field

from tune.results.outcomes import Outcome
from tune.space import Space

BEST_SHARE = 0.25
MIN_POINTS = 20  # so that five are in the best quarter, which Optuna recommends


@dataclass(frozen=True)
class Importance:
    """Shares of the settings, which add up to 1, or why there are none."""

    shares: dict[str, float] = field(default_factory=dict)  # by axis label, largest first
    points: int = 0  # that have a score
    missing: str = ""  # why there are no shares


def find_importance(space: Space, outcomes: list[Outcome]) -> Importance:
    """The importance of each axis for reaching the best quarter."""
    scored = [outcome for outcome in outcomes if outcome.score is not None]
    if space.search.early_stop == "pbt":
        return Importance(points=len(scored), missing="pbt changes values during the training of a trial")
    if len(scored) < MIN_POINTS:
        missing = f"it needs at least {MIN_POINTS} points with a score, and there are {len(scored)}"
        return Importance(points=len(scored), missing=missing)
    if max(outcome.score or 0 for outcome in scored) == min(outcome.score or 0 for outcome in scored):
        return Importance(points=len(scored), missing="all points have the same score")
    found = _compute(space, scored)
    if sum(found.values()) == 0:
        return Importance(points=len(scored), missing="the best quarter has the same values as all points")
    shares = {label: value / sum(found.values()) for label, value in found.items()}
    ordered = sorted(shares, key=lambda label: shares[label], reverse=True)
    return Importance({label: shares[label] for label in ordered}, len(scored))


def _compute(space: Space, scored: list[Outcome]) -> dict[str, float]:
    import optuna  # takes a second

    from tune.search.tpe import distribution, encode

    distributions = {axis.label: distribution(axis) for axis in space.axes}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)  # it prints a line for each study
    try:
        study = optuna.create_study(direction="maximize")
        for outcome in scored:
            values = encode(space, outcome.values)
            study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=outcome.score))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # with many equal scores the best quarter may be all points
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
            found = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
    finally:
        optuna.logging.set_verbosity(level)
    return {axis.label: float(found.get(axis.label, 0.0)) for axis in space.axes}
