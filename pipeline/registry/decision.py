"""Whether a version replaces the one in use, and on which data the two are compared. Pure, without MLflow and Ray.

Raises ConfigError if no data can be chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.evaluation.analysis.result import CategoryDifference, Comparison, Estimate

ROUNDING = 1e-9  # a gain of 0.412 - 0.410 is one of 0.002
SHOWN = 5  # classes that a reason names


@dataclass(frozen=True)
class Rules:
    """What a version must reach."""

    metric: str = "AP"  # of coco.METRICS
    min_gain: float = 0.002  # of the metric
    no_class_below: float = -0.02  # difference of the AP of every class


@dataclass(frozen=True)
class Decision:
    """The result of a comparison."""

    passed: bool
    reason: str


def decide(comparison: Comparison, rules: Rules) -> Decision:
    """Compare a version with the one in use.

    The gain and the differences of the classes themselves count, not their intervals; the reason names those.

    Args:
        comparison: of the version with the one in use; it has objects of the metric.
        rules: what is required.
    """
    difference = comparison.metrics[rules.metric].difference
    gains = difference.value >= rules.min_gain - ROUNDING
    fallen = [
        each
        for each in comparison.categories
        if each.ap.value >= 0 and each.ap.difference.value < rules.no_class_below - ROUNDING
    ]
    reasons = [
        f"{rules.metric} changes by {show_change(difference)}, "
        + ("at least" if gains else "less than")
        + f" --min-gain {rules.min_gain:g}"
    ]
    interval = difference.interval
    if gains and interval is not None and interval.low <= 0 <= interval.high:
        reasons.append("the interval contains 0: another choice of images could show no gain")
    if fallen:
        count = "1 class is" if len(fallen) == 1 else f"{len(fallen)} classes are"
        reasons.append(f"{count} below --no-class-below {rules.no_class_below:g}: {_list(fallen)}")
    else:
        reasons.append(f"no class is below --no-class-below {rules.no_class_below:g}")
    return Decision(gains and not fallen, "; ".join(reasons))


def show_change(change: Estimate) -> str:
    """A difference with its interval."""
    interval = change.interval
    return f"{change.value:+.4f}" + (f" (95%: {interval.low:+.4f} to {interval.high:+.4f})" if interval else "")


def _list(fallen: Sequence[CategoryDifference]) -> str:
    worst = sorted(fallen, key=lambda each: each.ap.difference.value)
    named = [f"{each.name} {show_change(each.ap.difference)}, {each.objects:,} objects" for each in worst[:SHOWN]]
    return "; ".join(named) + (f"; and {len(worst) - SHOWN} more" if len(worst) > SHOWN else "")


@dataclass(frozen=True)
class ValidationData:
    """The validation shards of a version."""

    version: str  # its address, for messages
    folder: str  # as its config names it; empty if it does not
    recorded: str  # digest when it was trained; empty if it is not known
    found: str  # digest of what is in the folder now; empty if nothing can be read there

    @property
    def digest(self) -> str:
        """Of the data that the version was validated on; empty if it is not known."""
        return self.recorded or self.found


def choose_folder(one: ValidationData, other: ValidationData) -> str:
    """The shards that both versions were validated on.

    Raises:
        ConfigError: they are not the same ones, are not known, or cannot be read; the message says which.
    """
    advice = "give the shards to compare on: data.val=SHARDS"
    for side in (one, other):
        if not side.digest:
            where = f"{side.folder} cannot be read" if side.folder else "it names no folder"
            raise ConfigError(f"the validation data of {side.version} are not known ({where}); {advice}")
    if one.digest != other.digest:
        digests = ", ".join(f"{side.version}: {side.folder} with digest {side.digest[:12]}" for side in (one, other))
        raise ConfigError(f"the versions were validated on different data ({digests}); {advice}")
    for side in (one, other):
        if side.found == one.digest:
            return side.folder
    now = ", ".join(
        f"{side.folder} {'holds other data now' if side.found else 'cannot be read'}" for side in (one, other)
    )
    raise ConfigError(f"the data that the versions were validated on are not there ({now}); {advice}")
