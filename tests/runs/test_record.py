"""The record of a run: found by folder, file, name or URL, written atomically, with clear errors if it is missing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import RunError
from pipeline.runs.evaluations import Evaluation, write_evaluations
from pipeline.runs.record import FILE, RunRecord, read_record, read_run, run_exists, write_run


def record(folder: object, **fields: object) -> RunRecord:
    return replace(RunRecord("first", str(folder), {"seed": 1}, "abc"), **fields)  # type: ignore[arg-type]


def test_read_run_by_folder_file_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "first"
    written = record(folder, status="FINISHED", metrics={"perf/x": 0.5}, data={"val": "d"}, last=f"{folder}/c2")
    write_run(written)
    for name in (str(folder), f"{folder}/", str(folder / FILE), "runs/first", "runs/first/run.json", "first"):
        assert read_run(name) == written
    assert run_exists(str(folder))
    assert not run_exists(str(tmp_path))


def test_write_run_any_filesystem_works() -> None:
    written = record("memory://bucket/runs/first", last="memory://bucket/runs/first/c")
    assert not run_exists(written.folder)
    write_run(written)
    assert read_run("memory://bucket/runs/first") == written
    assert read_run("memory://bucket/runs/first/run.json") == written


def test_write_run_again_replaces_file(tmp_path: Path) -> None:
    for status in ("RUNNING", "FAILED", "RUNNING", "FINISHED"):
        write_run(record(tmp_path, status=status))
    assert read_run(str(tmp_path)).status == "FINISHED"
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_checkpoint_best_is_preferred_to_last(tmp_path: Path) -> None:
    assert record(tmp_path, last="/c/2", best="/c/1").checkpoint == "/c/1"
    assert record(tmp_path, last="/c/2").checkpoint == "/c/2"
    with pytest.raises(RunError, match="first"):
        _ = record(tmp_path).checkpoint


def row(name: str, step: float, ap: float) -> Evaluation:
    return Evaluation(name, {"epoch": 0.0, "step": step, "AP": ap, "AP50": ap})


@pytest.mark.parametrize(
    ("there", "best"),
    [(["a", "b", "c", "d"], "c"), (["a", "b", "d"], "b"), (["a", "d"], "a"), (["d"], None), ([], None)],
)
def test_with_best_takes_highest_existing_checkpoint(tmp_path: Path, there: list[str], best: str | None) -> None:
    """The later one of equals; a row's checkpoint may be missing; -1 is a set without objects."""
    rows = [row("a", 1, 0.1), row("b", 2, 0.5), row("c", 3, 0.5), row("", 4, 0.9), row("d", 5, -1.0)]
    write_evaluations(str(tmp_path), rows)
    write_run(record(tmp_path, last=f"{tmp_path}/d", metrics={"perf/x": 1.0}))
    for name in there:
        (tmp_path / name).mkdir()
    found = read_run(str(tmp_path))
    assert found.best == (f"{tmp_path}/{best}" if best else None)
    ap = {"a": 0.1, None: None}.get(best, 0.5)
    assert found.metrics == {"perf/x": 1.0} | ({} if ap is None else {"val/AP": ap, "val/AP50": ap})
    assert read_record(str(tmp_path)) == record(tmp_path, last=f"{tmp_path}/d", metrics={"perf/x": 1.0})


def test_write_run_does_not_store_ap(tmp_path: Path) -> None:
    written = record(tmp_path, last="/c/2", best="/c/1", metrics={"val/AP": 0.5, "perf/x": 1.0})
    write_run(written)
    assert read_run(str(tmp_path)) == replace(written, best=None, metrics={"perf/x": 1.0})
    assert "val/AP" not in (tmp_path / FILE).read_text()


def test_read_run_of_version_0_1_has_its_own_best(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    old = record(folder, last=f"{folder}/c2", best=f"{folder}/c1", metrics={"val/AP": 0.5, "perf/x": 1.0})
    write_version_1(old)
    assert read_run(str(folder)) == old
    write_evaluations(str(folder), [row("c", 3, 0.25)])  # of tasks, which it wrote as well
    (folder / "c").mkdir()
    assert read_run(str(folder)).metrics == {"val/AP": 0.25, "val/AP50": 0.25, "perf/x": 1.0}


def test_read_run_damaged_evaluations_raise(tmp_path: Path) -> None:
    write_run(record(tmp_path))
    (tmp_path / "evaluations.json").write_text("{")
    with pytest.raises(RunError, match=r"evaluations\.json"):
        read_run(str(tmp_path))
    assert read_record(str(tmp_path)) == record(tmp_path)


def test_read_run_missing_run_names_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"'fifth' .*\bruns: none$"):
        read_run("fifth")
    for name in ("second", "first"):
        write_run(record(tmp_path / "runs" / name))
    with pytest.raises(RunError, match=r"'fifth' .*fifth/run\.json.*\bruns: first, second$"):
        read_run("fifth")
    with pytest.raises(RunError, match=r"/runs: first, second$"):
        read_run(str(tmp_path / "runs" / "third"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", FILE),
        ("[]", FILE),
        ('{"name": "x"}', r"run\.json is damaged \(KeyError\('version'\)\); restore it"),
        (json.dumps({"version": 1, "name": "x"}), FILE),
        (json.dumps({"version": 1, "name": "x", "folder": "y", "config": {}, "surprise": 1}), FILE),
        (json.dumps({"version": 2, "name": "x"}), FILE),
        (json.dumps({"version": 2, "name": "x", "folder": "y", "config": "z"}), FILE),
        (json.dumps({"version": 99}), r"\b99\b"),
    ],
)
def test_read_run_foreign_or_future_file_raises(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RunError, match=named) as raised:
        read_run(str(tmp_path))
    assert raised.value.exit_code == 2


def write_version_1(record: RunRecord) -> None:
    """As the code before version 2 wrote it."""
    document = {key: value for key, value in vars(record).items() if key != "data"} | {"version": 1}
    Path(record.folder).mkdir(parents=True)
    (Path(record.folder) / FILE).write_text(json.dumps(document, indent=1))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("moved", "found"), [("", "first"), ("first", "first"), ("first", "other name"), ("all", "first")]
)
def test_read_run_moved_finds_checkpoints_and_database(tmp_path: Path, version: int, moved: str, found: str) -> None:
    """One run is moved away from its database, or the whole storage with the database in it."""
    runs, target = tmp_path / "runs", tmp_path / "elsewhere" / "deep"
    config = {"name": "first", "storage": str(runs), "tracking": {"uri": f"sqlite:///{runs}/mlflow.db"}}
    folder = runs / "first"
    written = RunRecord("first", str(folder), config, last=f"{folder}/checkpoint_2", best=f"{folder}/checkpoint_1")
    (write_version_1 if version == 1 else write_run)(written)
    (runs / "mlflow.db").touch()
    target.parent.mkdir()
    if moved == "all":
        runs.rename(target)
        folder = target / "first"
    elif moved:
        folder = target / found
        target.mkdir()
        (runs / "first").rename(folder)
    record = read_run(str(folder))
    assert (record.last, record.best) == (f"{folder}/checkpoint_2", f"{folder}/checkpoint_1" if version == 1 else None)
    assert record.folder == str(folder)
    database = (target if moved == "all" else runs) / "mlflow.db"
    assert record.config["tracking"]["uri"] == f"sqlite:///{database}"
    write_run(record)  # it is written as version 2 where it is now
    assert read_run(f"{folder}/run.json") == replace(record, best=None)
    assert json.loads((folder / FILE).read_text())["last"] == "checkpoint_2"


@pytest.mark.parametrize("version", [1, 2])
def test_read_run_relative_folder_gives_absolute_paths(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "old" / "runs" / "first"
    written = record(folder, last=f"{folder}/c")
    (write_version_1 if version == 1 else write_run)(written)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    for name in ("first", "runs/first", "runs/first/run.json", "./runs/first/"):
        assert read_run(name).last == f"{tmp_path}/new/runs/first/c"


def test_read_run_downloaded_from_a_store_finds_its_checkpoints(tmp_path: Path) -> None:
    written = record("memory://bucket/runs/there", last="memory://bucket/runs/there/c")
    write_run(written)
    content = fsspec.filesystem("memory").cat_file("/bucket/runs/there/run.json")
    (tmp_path / FILE).write_bytes(content)
    assert b"memory://" not in content
    assert read_run(str(tmp_path)).last == f"{tmp_path}/c"
