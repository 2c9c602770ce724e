"""The report of a sweep: the numbers of its page are those of MLflow, in any state of the sweep."""

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from support.browser import foreign_addresses
from support.pages import tables_of
from support.recorded_sweeps import numbers_of, play_all, record_sweep, small_base
from support.sweeps import Play, make_space

from jobs.cli import main
from pipeline.config import TrackingConfig
from pipeline.errors import PreemptedError, SweepError
from pipeline.files.folder_lock import Owner
from pipeline.model import build_model
from pipeline.runs.record import RunRecord, write_run
from tune.report import build_parser, run
from tune.results.register import register_best
from tune.results.report import report_at_end, report_sweep
from tune.results.source import add_costs, read_results
from tune.search.ledger import FILE, Ledger, write_ledger
from tune.search.sampling import best_point
from tune.settings import Domain
from tune.space import VARIANT, Axis, Space

BUNDLES: dict[str, dict[str, Any]] = {"plain": {}, "more_points": {"model.enc_points": 8, "model.dec_points": 8}}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ledger, str]:
    """A sweep of two variants with two seeds each: folder, ledger, MLflow store."""
    folder = tmp_path_factory.mktemp("recorded")
    uri = f"sqlite:///{folder}/mlflow.db"
    axis = Axis((VARIANT,), Domain(choice=tuple(BUNDLES)), BUNDLES)
    space = make_space({"sampler": "grid", "repeats": 2}, {}, epochs=4)
    space = replace(space, base=small_base(folder, 4, tracking={"uri": uri}), axes=(axis,))
    ledger = record_sweep(space, play_all(space), folder / "sweep")
    report_sweep(str(folder / "sweep"))
    return folder / "sweep", ledger, uri


def test_page_has_the_numbers_of_mlflow(recorded: tuple[Path, Ledger, str]) -> None:
    folder, ledger, uri = recorded
    client = mlflow.MlflowClient(uri)
    parent = client.get_run(ledger.run_id or "")
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{ledger.run_id}'")
    runs = {run.info.run_name: run for run in children}
    assert len(runs) == len(ledger.trials) == 4
    history = {
        name: {point.step: point.value for point in client.get_metric_history(run.info.run_id, "val/AP")}
        for name, run in runs.items()
    }
    tables = tables_of((folder / "report/index.html").read_text("utf-8"))

    shown: dict[str, dict[int, float]] = {name: {} for name in runs}
    for row in tables["Evaluations, in the order of their arrival"]:
        shown[str(row["trial"])][int(float(str(row["step"])))] = float(str(row["val/AP"]))
    assert shown == history

    ranked = tables["Points, best first"]
    assert [row["val/AP"] for row in ranked] == sorted((row["val/AP"] for row in ranked), reverse=True)  # type: ignore[type-var]
    assert len(ranked) == 2
    for row in ranked:
        mine = [name for name in runs if name.startswith(f"{row['point']}-")]
        best = [max(history[name].values()) for name in mine]
        assert row["val/AP"] == statistics.fmean(best)
        assert row["spread"] == statistics.stdev(best)
        metrics = [runs[name].data.metrics for name in mine]
        assert {each["model/parameters"] for each in metrics} == {float(str(row["parameters (M)"])) * 1e6}
        assert {each["model/multiply_adds"] for each in metrics} == {float(str(row["multiply-adds (G)"])) * 1e9}
        assert row["s / epoch"] == statistics.fmean(each["perf/epoch_s"] for each in metrics)

    for row in tables["Trials, in the order of the search"]:
        run = runs[str(row["trial"])]
        assert row["MLflow run"] == run.info.run_id
        assert str(int(float(str(row["seed"])))) == run.data.params["seed"]
        assert row["val/AP"] == max(history[str(row["trial"])].values())
        assert row["s / epoch"] == run.data.metrics["perf/epoch_s"]

    for row in tables["COCO numbers of the points, best first"]:
        mine = [name for name in runs if name.startswith(f"{row['point']}-")]
        at = {name: max(history[name], key=lambda step, name=name: history[name][step]) for name in mine}
        for metric in ("AP", "AP50", "AP75", "AP_small", "AP_medium"):
            points = {name: client.get_metric_history(runs[name].info.run_id, f"val/{metric}") for name in mine}
            values = [next(each.value for each in points[name] if each.step == at[name]) for name in mine]
            assert row[metric] == statistics.fmean(values)
        assert row["AP_large"] is None


def test_costs_are_those_of_the_models(recorded: tuple[Path, Ledger, str]) -> None:
    folder, _, _ = recorded
    results = add_costs(read_results(str(folder)))
    assert not results.cost_fault
    by_variant = {trial.values[VARIANT]: results.costs[trial.name] for trial in results.ledger.trials}
    for variant, cost in by_variant.items():
        config = results.space.config({VARIANT: variant}, "any")
        assert cost.parameters == sum(each.numel() for each in build_model(config.model).parameters())
    assert by_variant["plain"].multiply_adds < by_variant["more_points"].multiply_adds
    assert results.runs["sweep-000-0"].epoch_seconds == pytest.approx(10 * (0.5 + 2.5 / 100))  # of epochs 1 to 4


def test_report_is_in_the_parent_run_and_may_be_repeated(recorded: tuple[Path, Ledger, str]) -> None:
    folder, ledger, uri = recorded
    client = mlflow.MlflowClient(uri)
    files = {path.name for path in (folder / "report").iterdir()}
    assert files == {"index.html", "curves.png", "values.png"}
    assert {Path(each.path).name for each in client.list_artifacts(ledger.run_id or "", "report")} == files
    html = (folder / "report/index.html").read_text("utf-8")
    assert Path(client.download_artifacts(ledger.run_id or "", "report/index.html")).read_text("utf-8") == html
    assert foreign_addresses(html) == []
    assert report_sweep(str(folder)).logged
    assert tables_of((folder / "report/index.html").read_text("utf-8")) == tables_of(html)
    run_id = read_results(str(folder)).runs["sweep-000-0"].record.run_id or ""
    assert len(client.get_metric_history(run_id, "model/parameters")) == 1


def untracked(tmp_path: Path, space: Space, ledger: Ledger) -> str:
    folder = tmp_path / "sweep"
    record_sweep(space, ledger, folder, tracked=False)
    return str(folder)


def page_of(folder: str) -> str:
    return Path(report_sweep(folder).page).read_text("utf-8")


@pytest.fixture(autouse=True)
def _no_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "search",
    [
        {"samples": 1, "scheduler": "none"},
        {"samples": 9, "scheduler": "asha", "reduction": 2, "concurrent": 3},
        {"samples": 6, "scheduler": "median", "concurrent": 6},
        {"samples": 4, "scheduler": "pbt", "quantile": 0.5, "concurrent": 2},
        {"samples": 12, "sampler": "tpe", "scheduler": "none"},
        {"samples": 2, "repeats": 2},
    ],
    ids=["one", "asha", "median", "pbt", "tpe", "repeats"],
)
def test_page_of_every_search_lists_all_points_and_evaluations(tmp_path: Path, search: dict[str, Any]) -> None:
    space = make_space(search)
    ledger = play_all(space)
    tables = tables_of(page_of(untracked(tmp_path, space, ledger)))
    assert len(tables["Points, best first"]) == len(ledger.points)
    scores = [
        (row["trial"], row["step"], row["val/AP"]) for row in tables["Evaluations, in the order of their arrival"]
    ]
    assert scores == [(each.trial, each.step, each.score) for each in ledger.reports]
    coco = {row["point"]: row["AP_small"] for row in tables["COCO numbers of the points, best first"]}
    assert len(coco) == len(ledger.points)
    if space.search.repeats == 1:
        for trial in ledger.trials:
            best = max((each for each in ledger.reports if each.trial == trial.name), key=lambda each: each.score)
            assert coco[trial.name] == numbers_of(best)["AP_small"]


def test_results_of_a_moved_sweep_name_the_store_that_was_moved_with_it(tmp_path: Path) -> None:
    space = make_space({"samples": 2, "scheduler": "none"})
    base = space.base.model_copy(update={"tracking": TrackingConfig(uri=f"sqlite:///{tmp_path}/old/mlflow.db")})
    space = replace(space, base=base)
    record_sweep(space, play_all(space), tmp_path / "old" / "sweep", tracked=False)
    (tmp_path / "old/mlflow.db").touch()
    (tmp_path / "old").rename(tmp_path / "new")
    results = read_results(str(tmp_path / "new/sweep"))
    assert results.record.config["tracking"]["uri"] == f"sqlite:///{tmp_path}/new/mlflow.db"
    assert set(results.runs) == {"sweep-000", "sweep-001"}


def test_page_shows_any_name_of_a_variant(tmp_path: Path) -> None:
    bundles: dict[str, dict[str, Any]] = {"_hidden": {}, "<b>$x_1$</b>": {"model.refine": True}}
    space = replace(
        make_space({"sampler": "grid"}, {}), axes=(Axis((VARIANT,), Domain(choice=tuple(bundles)), bundles),)
    )
    html = page_of(untracked(tmp_path, space, play_all(space)))
    assert {row["variant"] for row in tables_of(html)["Points, best first"]} == set(bundles)
    assert "<b>$x" not in html
    legend = html[html.index("<svg") : html.index("</svg>")]
    assert "_hidden" in legend
    assert "&lt;b&gt;$x_1$" in legend


def test_page_of_a_folder_with_a_space_has_a_command_that_runs(tmp_path: Path) -> None:
    space = make_space({"samples": 1, "scheduler": "none"})
    (folder := tmp_path / "my runs").mkdir()
    html = page_of(untracked(folder, space, play_all(space)))
    assert f"python -m jobs.train '{folder}/sweep/best.yaml'" in html.replace("&#39;", "'").replace("&#x27;", "'")


def test_page_has_the_seeds_that_were_searched(tmp_path: Path) -> None:
    space = make_space({"sampler": "grid"}, {"seed": {"grid": (7, 3)}})
    tables = tables_of(page_of(untracked(tmp_path, space, play_all(space))))
    assert [row["seed"] for row in tables["Trials, in the order of the search"]] == [7, 3]


def test_page_of_an_unfinished_sweep_has_what_its_runs_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = make_space({"samples": 3, "concurrent": 2, "scheduler": "none"})
    play = Play(space)
    play.act([("start", 0), ("start", 0), ("train", 0), ("train", 1)])
    folder = untracked(tmp_path, space, play.sweep.ledger)
    write_ledger(folder, replace(read_results(folder).written, reports=()))  # it died before it could write them
    html = page_of(folder)
    tables = tables_of(html)
    assert len(tables["Evaluations, in the order of their arrival"]) == 2
    assert [row["what happened"] for row in tables["What happened to the trials"]] == ["has not ended"] * 2
    assert "--resume" in html
    assert (Path(folder) / "best.yaml").exists()
    owner = Owner("token", "other-host", "other-machine", os.getpid(), "born", "today")  # containers share ids
    monkeypatch.setattr("tune.results.source.read_owner", lambda folder: owner)
    html = page_of(folder)
    assert "other-host" in html
    assert "--resume" not in html


def test_page_of_failed_trials_has_their_causes_and_no_best(tmp_path: Path) -> None:
    space = make_space({"samples": 2, "trial_failures": 0, "scheduler": "none"})
    play = Play(space)
    play.act([("start", 0), ("fail", 0), ("start", 0), ("fail", 0)])
    folder = untracked(tmp_path, space, play.finish())
    tables = tables_of(page_of(folder))
    assert [(row["what happened"], row["why"]) for row in tables["What happened to the trials"]] == [
        ("failed", "out of memory")
    ] * 2
    assert [row["val/AP"] for row in tables["Points, best first"]] == [None, None]
    assert not (Path(folder) / "best.yaml").exists()
    with pytest.raises(SweepError, match="out of memory"):
        register_best(read_results(folder))


def test_page_of_a_sweep_without_trials_and_shards_says_so(tmp_path: Path) -> None:
    space = make_space({"samples": 2})
    html = page_of(untracked(tmp_path, space, Play(space).sweep.ledger))
    assert "none was started" in html
    space = replace(
        space, base=space.base.model_copy(update={"data": space.base.data.model_copy(update={"val": "no"})})
    )
    html = page_of(untracked(tmp_path, space, play_all(space)))
    assert "Parameters and multiply-adds are not known" in html


def test_report_at_end_reports_after_a_failure_but_not_after_sigterm(tmp_path: Path) -> None:
    space = make_space({"samples": 1, "scheduler": "none"})
    folder = untracked(tmp_path, space, play_all(space))
    page = Path(folder) / "report/index.html"
    with pytest.raises(PreemptedError), report_at_end(folder):
        raise PreemptedError("the machine goes")
    assert not page.exists()
    with pytest.raises(KeyboardInterrupt), report_at_end(folder):
        raise KeyboardInterrupt
    assert page.exists()


def test_report_at_end_failing_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with report_at_end(str(tmp_path / "none")):  # nothing was written
        pass
    assert not caplog.records
    (tmp_path / FILE).write_text("{}")
    with report_at_end(str(tmp_path)):
        pass
    assert "tune.report" in caplog.text


def test_register_best_takes_the_best_repeat_of_the_best_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = make_space({"samples": 3, "repeats": 2})
    ledger = play_all(space)
    folder = untracked(tmp_path, space, ledger)
    asked: list[tuple[str, str, str]] = []

    def register(record: RunRecord, name: str, alias: str, tracking_uri: str | None) -> str:
        asked.append((record.name, name, alias))
        return "7"

    monkeypatch.setattr("pipeline.registry.register.register", register)
    assert register_best(read_results(folder)) == ("sweep", "7")
    assert register_best(read_results(folder), "mine") == ("mine", "7")
    point = best_point(ledger)
    assert point is not None
    winner = max(ledger.of_point(point), key=lambda trial: ledger.score(trial.name) or 0.0)
    assert asked == [(winner.name, "sweep", "challenger"), (winner.name, "mine", "challenger")]


@pytest.mark.parametrize(
    ("prepare", "match"),
    [
        (lambda folder: None, "runs"),
        (lambda folder: (folder / "sweep").mkdir(), "sweep.json"),
        (lambda folder: (folder / "sweep").write_text("a file"), "sweep.json"),
        (lambda folder: _write(folder, '{"version": 9}'), "version 9"),
        (lambda folder: _write(folder, "half a fi"), "sweep.json"),
    ],
    ids=["nothing", "empty folder", "file", "other version", "damaged"],
)
def test_command_without_a_sweep_exits_2(
    tmp_path: Path, prepare: Callable[[Path], None], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(build_parser(), run, ["sweep"]) == 2
    assert match in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_command_with_a_space_file_or_a_run_names_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(build_parser(), run, ["space.yaml"]) == 2
    assert "space file" in capsys.readouterr().err
    write_run(RunRecord("one", str(tmp_path / "runs/one"), {}))
    assert main(build_parser(), run, ["one"]) == 2
    assert "jobs.analyse" in capsys.readouterr().err


def test_command_with_a_wrong_model_name_exits_2_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = make_space({"samples": 2, "scheduler": "none"})
    folder = untracked(tmp_path, space, play_all(space))
    assert main(build_parser(), run, [folder, "--register=a/b"]) == 2
    assert "--register" in capsys.readouterr().err
    assert not (Path(folder) / "report").exists()


def test_command_prints_table_page_and_finds_names_under_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = make_space({"samples": 2, "scheduler": "none"})
    record_sweep(space, play_all(space), tmp_path / "runs" / "sweep", tracked=False)
    for name in ("sweep", "runs/sweep", f"{tmp_path}/runs/sweep/sweep.json"):
        assert main(build_parser(), run, [name]) == 0
        said = capsys.readouterr().out
        assert f"page: {tmp_path}/runs/sweep/report/index.html" in said
        assert "sweep-001" in said


def _write(folder: Path, text: str) -> None:
    (folder / "sweep").mkdir()
    (folder / "sweep" / FILE).write_text(text)
