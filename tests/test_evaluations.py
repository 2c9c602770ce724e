"""The file of evaluation tasks: rows, and how they join the history."""

from pathlib import Path

import pytest

from pipeline.training.evaluations import FILE, Evaluation, add_evaluation, merged, outcome, read_evaluations


def entry(step: float, ap: float = 0.5) -> dict[str, float]:
    return {"epoch": step // 10 - 1, "step": step, "AP": ap, "AP50": 2 * ap}


def test_rows_come_back_by_step_and_each_step_once(tmp_path: Path) -> None:
    folder = f"local://{tmp_path}"
    assert read_evaluations(folder) == []
    for step, ap in ((20.0, 0.1), (10.0, 0.2), (20.0, 0.3)):
        add_evaluation(folder, Evaluation(f"checkpoint_{step:.0f}", entry(step, ap)))
    rows = read_evaluations(str(tmp_path))
    assert [(row.entry["step"], row.entry["AP"]) for row in rows] == [(10, 0.2), (20, 0.3)]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 9}', '{"version": 1, "evaluations": [{}]}'])
def test_a_file_that_cannot_be_read_is_a_warning(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_text(content)
    assert read_evaluations(str(tmp_path)) == []
    assert f"{FILE} cannot be read" in caplog.text


def test_a_late_result_takes_its_place_in_the_history() -> None:
    rows = [Evaluation("a", entry(10)), Evaluation("b", entry(20, 0.9)), Evaluation("d", entry(40))]
    known = (entry(20, 0.2), entry(30))
    found = merged(known, rows, until=30)
    assert [each["step"] for each in found] == [10, 20, 30]  # 40 will come again
    assert found[1]["AP"] == 0.2  # what the state says of a step stays
    assert merged((), [], 100) == ()


def test_people_count_epochs_from_one() -> None:
    assert outcome(entry(10, 0.25)) == "epoch 1 evaluated: AP 0.2500  AP50 0.5000"
