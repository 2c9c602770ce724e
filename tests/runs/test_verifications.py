"""Verdicts of pycocotools beside a run: their file, and whose numbers readers of the run get."""

from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.runs.evaluations import SUBSET, Evaluation, outcome, read_evaluations, write_evaluations
from pipeline.runs.record import RunRecord, read_run, write_run
from pipeline.runs.verifications import FILE, Verdict, read_verdicts, write_verdict

ROW = {"epoch": 0.0, "step": 7.0, "AP": 0.25, "AP50": 0.5}


def verdict(step: int = 7, differences: tuple[str, ...] = ("precision",), scored: float = 0.25) -> Verdict:
    return Verdict(step, "fast 1.0", "pycocotools 2.0", list(differences), {"AP": scored}, {"AP": 0.125})


def test_read_verdicts_newest_of_a_step_counts(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert read_verdicts(folder) == []
    for each in (verdict(9), verdict(7), verdict(9, ())):
        write_verdict(folder, each)
    assert read_verdicts(folder) == [verdict(7), verdict(9, ())]


@pytest.mark.parametrize("body", ["", "[]", '{"version": 2, "verdicts": []}', '{"version": 1, "verdicts": [{"a": 1}]}'])
def test_read_verdicts_damaged_file_is_named(tmp_path: Path, body: str) -> None:
    (tmp_path / FILE).write_text(body)
    with pytest.raises(RunError, match=FILE):
        read_verdicts(str(tmp_path))


@pytest.mark.parametrize(
    ("each", "ap"),
    [
        (verdict(), 0.125),
        (verdict(differences=()), 0.25),
        (verdict(step=8), 0.25),
        (verdict(scored=0.3), 0.25),  # of an earlier evaluation at this step
    ],
)
def test_read_evaluations_takes_pycocotools_where_it_differs(tmp_path: Path, each: Verdict, ap: float) -> None:
    folder = str(tmp_path)
    write_evaluations(folder, [Evaluation("c", ROW)])
    write_verdict(folder, each)
    assert read_evaluations(folder) == [Evaluation("c", {**ROW, "AP": ap})]
    write_evaluations(folder, read_evaluations(folder))  # as the next evaluation does
    assert read_evaluations(folder) == [Evaluation("c", {**ROW, "AP": ap})]


def test_verdict_summary_shows_numbers_only_if_they_differ() -> None:
    assert "0.125" in verdict().summary
    assert "0.25" in verdict().summary
    assert "equals" in verdict(differences=()).summary


@pytest.mark.parametrize(("whole", "best"), [(True, "a"), (False, "b")])
def test_read_run_subset_is_best_only_without_another(tmp_path: Path, whole: bool, best: str) -> None:
    write_run(RunRecord("run", str(tmp_path), {}))
    rows = [Evaluation("b", {**ROW, "step": 9.0, "AP": 0.9, SUBSET: 10.0})]
    rows += [Evaluation("a", ROW)] if whole else []
    write_evaluations(str(tmp_path), rows)
    for name in "ab":
        (tmp_path / name).mkdir()
    assert read_run(str(tmp_path)).best == str(tmp_path / best)


def test_outcome_says_how_many_images() -> None:
    assert "images" not in outcome(ROW)
    assert "only 10 images" in outcome({**ROW, SUBSET: 10.0})
