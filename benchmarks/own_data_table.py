"""The table of `benchmarks.own_data` in docs/own_data.md: means over seeds, and differences seed by seed.

It replaces what is between two marks of the page. Missing results are said. A page without the marks is a RunError.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.miniature.results import Recorded
from benchmarks.own_data_sets import SETS
from pipeline.errors import RunError
from pipeline.files.atomic import write_file

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TITLES = {
    "nothing": "from nothing, published augmentation",
    "none": "fine-tuned, no augmentation",
    "published": "fine-tuned, published augmentation",
    "small": "fine-tuned, `small`",
    "strong": "fine-tuned, `strong`",
    "balance": "fine-tuned, published, `data.balance=0.3`",
    "long": "fine-tuned, published, 4 times the steps",
    "long_small": "fine-tuned, `small`, 4 times the steps",
    "long_strong": "fine-tuned, `strong`, 4 times the steps",
}


@dataclass(frozen=True)
class Question:
    """Whether one row is better than another on a data set."""

    text: str
    name: str  # of the data set
    better: str
    worse: str
    metric: str = "AP"


QUESTIONS = (
    *(Question("start weights", name, "published", "nothing") for name in SETS),
    *(Question("published augmentation", name, "published", "none") for name in SETS),
    *(Question("`small` instead of published", name, "small", "published") for name in SETS),
    *(Question("`strong` instead of published", name, "strong", "published") for name in SETS),
    Question("4 times the steps", "few", "long", "published"),
    Question("`small` instead of published, 4 times the steps", "few", "long_small", "long"),
    Question("`strong` instead of published, 4 times the steps", "few", "long_strong", "long"),
    Question("balance", "rare", "balance", "published"),
    Question("balance, for the rare classes", "rare", "balance", "published", "AP_rare"),
)


def update_page(results: Sequence[Recorded], page: Path) -> None:
    """Write the table of these results into the page. Raises RunError, OSError."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise RunError(f"{page} has not one line {BEGIN} and one line {END}; put them where the table belongs")
    before, rest = text.split(BEGIN)
    table = "\n".join(table_lines(results))
    write_file(page, f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}".encode())


def table_lines(results: Sequence[Recorded]) -> list[str]:
    """The two tables as Markdown."""
    if not results:
        return ["Not measured yet."]
    lines = ["| Data | Training | AP | AP50 | AP of rare classes | seeds |", "|---|---|---|---|---|---|"]
    for name, drawn in SETS.items():
        for row, title in TITLES.items():
            found = [each for each in results if (each["set"], each["row"]) == (name, row)]
            if found:
                cells = [_mean(found, "AP"), _mean(found, "AP50"), _mean(found, "AP_rare") if drawn.rare else ""]
                lines.append(f"| {drawn.title} | {title} | {' | '.join(cells)} | {len(found)} |")
    answers = [line for question in QUESTIONS if (line := _answer(question, results))]
    if answers:
        lines += ["", "| Question | Data | Difference in AP, seed by seed | Mean |", "|---|---|---|---|", *answers]
    missing = [f"{row} of {name}" for name, row in _missing(results)]
    lines += ["", f"Not measured yet: {', '.join(missing)}."] if missing else []
    return lines


def _answer(question: Question, results: Sequence[Recorded]) -> str:
    values = [
        {each["seed"]: each[question.metric] for each in results if (each["set"], each["row"]) == (question.name, row)}
        for row in (question.better, question.worse)
    ]
    pairs = [values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())]
    if not pairs:
        return ""
    shown = ", ".join(map(_signed, pairs))
    return f"| {question.text} | {SETS[question.name].title} | {shown} | {_signed(sum(pairs) / len(pairs))} |"


def _signed(difference: float) -> str:
    return f"{round(difference, 3) + 0.0:+.3f}"  # + 0.0 makes -0.0 zero


def _missing(results: Sequence[Recorded]) -> list[tuple[str, str]]:
    there = {(each["set"], each["row"]) for each in results}
    wanted = [(question.name, row) for question in QUESTIONS for row in (question.better, question.worse)]
    return [pair for pair in dict.fromkeys(wanted) if pair not in there]


def _mean(found: Sequence[Recorded], metric: str) -> str:
    return f"{sum(each[metric] for each in found) / len(found):.3f}"
