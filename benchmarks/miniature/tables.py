"""Tables of the findings: means and spreads over seeds, and whether each claim of the paper is seen here.

All functions are pure. AP is in percent, as the paper prints it.
"""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.miniature.results import Recorded
from benchmarks.miniature.rows import GROUPS, ROWS, SEEDS, Claim, Group
from pipeline.presets.published import find_published

NOT_RUN = "not run yet"
COLUMNS = {"AP": "AP", "AP50": "AP50", "AP_small": "AP small", "AP_medium": "AP medium"}

Results = Mapping[str, Sequence[Recorded]]  # of each row, by ascending seed


def group_section(name: str, results: Results) -> str:
    """The tables of one group."""
    group = GROUPS[name]
    return f"{rows_table(group, results)}\n\n{claims_table(group, results)}"


def rows_table(group: Group, results: Results) -> str:
    """A line per row: means and spreads, and the paper's AP where it has the row."""
    head = ["row", "epochs", *COLUMNS.values(), "parameters", "processor s", "seeds", "paper: AP", "AP small"]
    lines = [head, ["---"] * len(head)]
    for name in group.rows:
        row, found = ROWS[name], results[name]
        published = find_published(row.preset)
        cells = [
            row.title,
            str(row.config(0).train.epochs),
            *(_percent([each[metric] for each in found]) for metric in COLUMNS),
            f"{found[0]['parameters'] / 1e6:.2f} M" if found else "",
            f"{statistics.mean(each['seconds'] for each in found):.0f}" if found else "",
            str(len(found)),
            f"{published.ap} ({published.epochs} epochs)" if published.ap else "",
            str(published.ap_small or ""),
        ]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def claims_table(group: Group, results: Results) -> str:
    """A line per claim: the difference of the two rows here and in the paper, and whether they agree."""
    lines = ["| the paper | there | here | seen here? |", "|---|---|---|---|"]
    for claim in group.claims:
        there = "" if claim.paper is None else f"{claim.paper:+.1f} {COLUMNS[claim.metric]}"
        found = differences(claim, results)
        here = f"{_percent(found, sign='+')} {COLUMNS[claim.metric]}" if found else NOT_RUN
        lines.append(f"| {claim.text} | {there} | {here} | {verdict(claim, found)} |")
    return "\n".join(lines)


def differences(claim: Claim, results: Results) -> list[float]:
    """The differences of the claim's two rows, for each seed that both have."""
    better, worse = (
        {each["seed"]: each[claim.metric] for each in results[name]} for name in (claim.better, claim.worse)
    )
    return [better[seed] - worse[seed] for seed in sorted(better.keys() & worse.keys())]


def verdict(claim: Claim, found: Sequence[float]) -> str:
    """Whether the differences agree with the claim.

    A difference is seen where all seeds have its sign. That something adds nothing can be refuted, not shown.
    """
    if not found:
        return ""
    if len(found) < len(SEEDS):
        return f"{len(found)} of {len(SEEDS)} seeds"
    if all(each > 0 for each in found):
        return "no: higher in all seeds" if claim.nothing else "yes, in all seeds"
    if all(each < 0 for each in found):
        return "no: lower in all seeds" if claim.nothing else "no: the opposite in all seeds"
    return "open: the seeds differ in sign"


def summary(results: Results) -> str:
    """The lines of the README: AP of the rows of group a, with that of small objects."""
    lines = []
    for name in GROUPS["a"].rows:
        title, found = ROWS[name].title.partition(":")[0], results[name]
        whole, small = (_percent([each[metric] for each in found]) for metric in ("AP", "AP_small"))
        epochs, seeds = ROWS[name].config(0).train.epochs, f"{len(found)} of {len(SEEDS)} seeds"
        text = f"AP {whole} % after {epochs} epochs, of small objects {small} % ({seeds})" if found else NOT_RUN
        lines.append(f"- {title}: {text}")
    return "\n".join(lines)


def _percent(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation in percent."""
    if not values:
        return NOT_RUN
    middle = f"{100 * statistics.mean(values):{sign}.1f}"
    return f"{middle} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else middle
