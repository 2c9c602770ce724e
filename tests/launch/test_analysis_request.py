"""Requests of `jobs.analyse` that cannot be met are refused before anything is loaded."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import AnnotationError, InputError, RunError
from pipeline.launch.analysis_request import AnalysisRequest, check_request, is_results
from pipeline.runs.record import RunRecord, write_run

REQUEST = AnalysisRequest("runs/a", None, None, (), None, None, 200)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two runs and two results files, which the command runs in."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(RunRecord(name, f"runs/{name}", {}))
    for name in ("r.json", "s.json"):
        Path(name).write_text("[]")
    return tmp_path


@pytest.mark.parametrize(
    ("side", "answer"),
    [
        ("results.json", True),
        ("/x/y.json", True),
        ("runs/a/run.json", False),
        ("runs/a", False),
        ("models:/a.json@b", False),
        ("models:/a@b", False),
    ],
)
def test_is_results_is_a_json_file_that_is_not_a_record(side: str, answer: bool) -> None:
    assert is_results(side) == answer


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target": "r.json"}, "--annotations"),
        ({"target": "r.json", "against": "s.json"}, "--annotations"),
        ({"annotations": Path("a.json")}, "data.val"),
        ({"target": "r.json", "against": "runs/b", "annotations": Path("a.json")}, "runs/b"),
        ({"target": "r.json", "annotations": Path("a.json"), "overrides": ("data.val=x",)}, "data.val"),
        ({"target": "r.json", "annotations": Path("a.json"), "overrides": ("evaluation.flip=1",)}, "evaluation.flip"),
        ({"overrides": ("optim.lr=1",)}, "optim.lr=1"),
        ({"draws": -1}, "--draws"),
    ],
)
def test_check_request_what_does_not_fit_is_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_request(replace(REQUEST, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"against": "models:/a@b", "overrides": ("data.val=x", "evaluation.flip=true")},
        {"target": "r.json", "annotations": Path("a.json")},
        {"target": "r.json", "against": "runs/b"},
        {"target": "r.json", "overrides": ("data.val=x",)},
    ],
)
def test_check_request_accepts_what_fits(changes: dict[str, object], folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    check_request(replace(REQUEST, out=folder / "new", **changes))  # type: ignore[arg-type]
    assert sorted(folder.rglob("*")) == before


def test_check_request_inputs_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RunError, match="runs/c"):
        check_request(replace(REQUEST, target="runs/c"))
    with pytest.raises(RunError, match="runs/c"):
        check_request(replace(REQUEST, against="runs/c"))
    with pytest.raises(AnnotationError, match=r"t\.json"):
        check_request(replace(REQUEST, against="t.json"))


def test_check_request_folder_with_a_foreign_page_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError):
            check_request(replace(REQUEST, out=out))
    (tmp_path / "analysis.json").write_text("{}")
    check_request(replace(REQUEST, out=tmp_path))
    with pytest.raises(InputError):  # its own input
        check_request(replace(REQUEST, target=str(tmp_path / "analysis.json"), overrides=("data.val=x",), out=tmp_path))


@pytest.mark.parametrize(
    ("target", "against", "name"),
    [
        ("runs/a", None, "a"),
        ("runs/a/run.json", None, "a"),
        ("models:/mine@champion", "x/results.json", "mine_champion-against-results"),
        ("s3://bucket/runs/b/", None, "b"),
        ("..", None, "analysis"),
    ],
)
def test_folder_is_named_after_what_is_analysed(target: str, against: str | None, name: str) -> None:
    assert replace(REQUEST, target=target, against=against).folder == Path("runs/analysis") / name
