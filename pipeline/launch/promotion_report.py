"""A promotion as text for a terminal, as JSON, as tags of its version, and as a page. Never fails."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline import __version__
from pipeline.evaluation.analysis.comparison import comparison_parts
from pipeline.evaluation.analysis.result import Comparison, Difference
from pipeline.launch.promotion_request import PromotionRequest
from pipeline.pages.parts import Facts, Page, Text
from pipeline.pages.render import clean, render
from pipeline.registry.decision import Decision
from pipeline.registry.versions import Version

FORMAT = 1
TAGS = "promotion/"  # before the name of each tag of a version
LOWEST = 5  # classes that the terminal shows

Verdict = Literal["promoted", "refused", "unchanged", "rolled back"]


@dataclass(frozen=True)
class Compared:
    """A comparison, on what, and what it means."""

    comparison: Comparison  # of the version with the one in use
    decision: Decision
    folder: str  # of the shards
    digest: str  # of their index
    images: int


@dataclass(frozen=True)
class Promotion:
    """What was asked, what was found, what became of it."""

    request: PromotionRequest
    version: Version  # that gets the alias, or does not
    before: Version | None  # that had it when the command began
    verdict: Verdict
    reason: str
    by: str  # user and machine
    at: str  # UTC
    compared: Compared | None = None  # None: nothing was compared
    artifact: str = ""  # folder among the artifacts of the version's run; empty if there is none

    @property
    def refused(self) -> bool:
        """Whether the alias stays where it was although another version was asked for."""
        return self.verdict == "refused"


def as_tree(promotion: Promotion) -> dict[str, Any]:
    """As JSON types, with all numbers."""
    request, before = promotion.request, promotion.before
    tree: dict[str, Any] = {
        "format": FORMAT,
        "package": __version__,
        "model": request.name,
        "version": promotion.version.number,
        "alias": request.target,
        "before": before.number if before else None,
        "verdict": promotion.verdict,
        "reason": promotion.reason,
        "by": promotion.by,
        "at": promotion.at,
        "artifact": promotion.artifact,
    }
    if promotion.compared is None:
        return tree
    compared = promotion.compared
    comparison = compared.comparison
    return tree | {
        "rules": {
            "metric": request.metric,
            "min_gain": request.min_gain,
            "no_class_below": request.no_class_below,
        },
        "data": {"folder": compared.folder, "digest": compared.digest, "images": compared.images},
        "settings": list(request.overrides),
        "bootstrap": {"draws": comparison.draws, "seed": comparison.seed, "level": comparison.level},
        "metrics": {name: asdict(each) for name, each in comparison.metrics.items()},
        "classes": [asdict(each) for each in comparison.categories],
    }


def as_tags(promotion: Promotion) -> dict[str, str]:
    """The tags of the version, by their names after `TAGS`."""
    before = promotion.before
    tags = {
        "verdict": promotion.verdict,
        "reason": promotion.reason,
        "alias": promotion.request.target,
        "by": promotion.by,
        "at": promotion.at,
    }
    if before is not None:
        tags["against"] = before.number
    if compared := promotion.compared:
        difference = compared.comparison.metrics[promotion.request.number]
        change = difference.difference
        tags |= {
            "metric": promotion.request.metric,
            "value": repr(difference.value),
            "difference": repr(change.value),
            "data_digest": compared.digest,
        }
        if change.interval is not None:
            tags |= {"difference_low": repr(change.interval.low), "difference_high": repr(change.interval.high)}
    if promotion.artifact:
        tags["artifact"] = promotion.artifact
    return {f"{TAGS}{key}": value for key, value in tags.items()}


def as_text(promotion: Promotion) -> str:
    """The numbers of both versions, the lowest classes, the verdict and what the aliases are now."""
    lines: list[str] = []
    if compared := promotion.compared:
        lines += _table(promotion, compared)
    lines.append(f"{promotion.verdict}: {promotion.reason}")
    if promotion.artifact:
        lines.append(f"artifacts of the version's run: {promotion.artifact}")
    return "\n".join(lines)


def as_page(promotion: Promotion, compared: Compared) -> str:
    """The HTML page with the numbers of all classes."""
    request = promotion.request
    against = promotion.before.uri if promotion.before else "none"
    facts = [
        ("Version", promotion.version.uri),
        ("Compared with", f"{against} (@{request.target})"),
        ("Data", f"{compared.folder}: {compared.images:,} images, digest {compared.digest}"),
        ("Rules", f"{request.metric} by {request.min_gain:g} at least; no class below {request.no_class_below:g}"),
        ("Settings", " ".join(request.overrides) or "those of each version"),
        ("By", f"{promotion.by}, {promotion.at}, package {__version__}"),
    ]
    passed = compared.decision.passed
    word = "The version passes" if passed else "The version does not pass"
    text = Text(f"{word}: {compared.decision.reason}.", warning=not passed)
    title = f"{promotion.version.uri} against {against}"
    return render(Page(title, [text, Facts(facts), *comparison_parts(compared.comparison, {}, {})]))


def _table(promotion: Promotion, compared: Compared) -> list[str]:
    before = promotion.before
    assert before is not None, "a comparison has two sides"
    rows = [(name, each) for name, each in compared.comparison.metrics.items() if each.value >= 0]
    classes = [each for each in compared.comparison.categories if each.ap.value >= 0]
    lowest = sorted(classes, key=lambda each: (each.ap.difference.value, each.id))[:LOWEST]
    named = [(str(clean(" ".join(each.name.split()))), each.ap) for each in lowest]
    width = max(len(name) for name, _ in [*rows, *named, ("lowest classes", None)])
    sides = f"version {promotion.version.number}", f"version {before.number}"
    head = f"{sides[0]:>11} {sides[1]:>11} {'difference':>11}  {compared.comparison.level:.0%} interval"
    return [
        f"{promotion.version.shown} against {before.shown}",
        f"on {compared.folder}: {compared.images:,} images, digest {compared.digest[:12]}",
        f"{'':<{width}} {head}",
        *(_line(name, each, width) for name, each in rows),
        f"{'lowest classes':<{width}}" if named else "no class has objects",
        *(_line(name, each, width) for name, each in named),
    ]


def _line(name: str, each: Difference, width: int) -> str:
    interval = each.difference.interval
    shown = f"  {interval.low:+.4f} to {interval.high:+.4f}" if interval else ""
    return f"{name:<{width}} {each.value:>11.4f} {each.other:>11.4f} {each.difference.value:>+11.4f}{shown}"
