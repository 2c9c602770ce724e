"""What `jobs.models` says of versions: numbers, files, settings and data that differ, and what is missing."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from support.inference import small_run
from support.promotions import NAME, Registry, open_registry

from jobs.cli import main
from jobs.models import build_parser, run
from pipeline.data.index import load_index
from pipeline.registry.kept_results import FOLDER, RECORD, RESULTS
from pipeline.registry.listing import list_models, list_rows, trace
from pipeline.registry.listing_text import lineage_text
from pipeline.registry.register import VAL_DIGEST_TAG, list_registered, register
from pipeline.tracking.lineage import log_data
from pipeline.tracking.store import TrackingStore


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """`old` is the champion; `new` was trained on other images, and its number in MLflow is 2."""
    registry = open_registry(tmp_path_factory.mktemp("registry"))
    for number, (name, train) in enumerate({"old": "val", "new": "other"}.items()):
        record = registry.add(name, seed=number)
        data = {"train": load_index(str(registry.folder / train)), "val": load_index(str(registry.folder / "val"))}
        log_data(registry.client, str(record.run_id), data)
        registry.client.set_tag(record.run_id, "mlflow.source.git.commit", f"commit of {name}")
        registry.client.set_tag(record.run_id, "resumed_with.1", json.dumps({"optim.lr": f"{number}e-4"}))
        registry.client.set_model_version_tag(NAME, registry.versions[name], "val/AP", f"0.{number + 3}")
        registry.client.set_model_version_tag(NAME, registry.versions[name], "val/AP_small", "-1.0")
        registry.client.set_model_version_tag(NAME, registry.versions[name], "test/AP50", "0.5")
    registry.reset(champion="old", challenger="new")
    return registry


@pytest.fixture
def store(registry: Registry) -> TrackingStore:
    return TrackingStore(registry.uri)


def models(registry: Registry, *words: str) -> int:
    return main(build_parser(), run, [*words, "--tracking-uri", registry.uri])


def test_list_models_counts_versions_and_aliases(store: TrackingStore) -> None:
    (row,) = [each for each in list_models(store) if each.name == NAME]
    assert (row.name, row.versions, row.aliases) == (NAME, 2, {"champion": "1", "challenger": "2"})


def test_list_rows_newest_first_with_what_differs_from_the_champion(registry: Registry, store: TrackingStore) -> None:
    new, old = list_rows(store, NAME)
    assert (new["version"], old["version"]) == ("2", "1")
    assert (new["AP"], old["AP"], new["AP50"], new["AP_small"]) == (0.4, 0.3, None, None)
    assert new["differs_from_champion"] == {"optim.lr": ["0e-4", "1e-4"]}, "its last start counts, not its name"
    assert old["differs_from_champion"] == {}
    assert new["bytes"] == sum(file.stat().st_size for file in registry.files_of("new").iterdir())
    assert new["val_digest"] == load_index(str(registry.folder / "val")).digest


def test_trace_names_run_commit_data_and_evaluations(registry: Registry, store: TrackingStore) -> None:
    tree = trace(store, NAME, "challenger", None)
    assert (tree["version"], tree["git_commit"], tree["run"]["name"]) == ("2", "commit of new", "new")
    assert tree["evaluations"] == {"test": {"AP50": 0.5}, "val": {"AP": 0.4, "AP_small": None}}
    assert tree["data"]["train"]["digest"] == load_index(str(registry.folder / "other")).digest
    assert tree["settings"]["data.val"] == str(registry.folder / "val")
    assert tree["against"] == {"version": "1", "settings": {"optim.lr": ["0e-4", "1e-4"]}}
    assert "against" not in trace(store, NAME, "1", None), "the champion itself"


def test_trace_against_another_version_compares_their_images(registry: Registry, store: TrackingStore) -> None:
    found = trace(store, NAME, "2", "1")["against"]["data"]
    assert found["val"] == []
    assert any("different files" in line for line in found["train"]), found
    hidden = registry.folder / "hidden"
    shutil.move(registry.folder / "other", hidden)
    try:
        (line,) = trace(store, NAME, "2", "1")["against"]["data"]["train"]
    finally:
        shutil.move(hidden, registry.folder / "other")
    assert line.startswith("not compared")


def test_trace_leaves_out_kept_results_that_cannot_be_read(registry: Registry, store: TrackingStore) -> None:
    folder = registry.artifacts_of("new") / FOLDER
    (folder / "killed").mkdir(parents=True)
    (folder / "killed" / RESULTS).write_text("[]")
    for name, text in {"cut": '{"key": ', "other": "[]", "older": '{"key": {}}'}.items():
        (folder / name).mkdir()
        (folder / name / RECORD).write_text(text)
    try:
        assert trace(store, NAME, "2", None)["promotion_results"] == []
    finally:
        shutil.rmtree(folder)


def test_list_registered_reads_every_page() -> None:
    models = [SimpleNamespace(name=name) for name in "cab"]

    def search(page_token: str | None = None) -> Any:
        at = int(page_token or 0)
        return _Page(models[at : at + 1], str(at + 1) if at + 1 < len(models) else None)

    client: Any = SimpleNamespace(search_registered_models=search)
    assert [model.name for model in list_registered(client)] == ["a", "b", "c"]


class _Page(list[Any]):
    def __init__(self, models: list[Any], token: str | None) -> None:
        super().__init__(models)
        self.token = token


def test_models_prints_what_it_finds(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert models(registry) == 0
    assert "@champion = 1" in capsys.readouterr().out
    assert models(registry, NAME) == 0
    head, new, old = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:3] == ["version", "aliases", "AP"]
    assert new[:5] == ["2", "@challenger", "0.4000", "-", "-"]
    assert "optim.lr=1e-4" in new
    assert old[:3] == ["1", "@champion", "0.3000"]
    assert models(registry, NAME, "--lineage", "2", "--against", "champion") == 0
    text = capsys.readouterr().out
    for part in ("commit of new", "AP 0.4000", "0e-4 -> 1e-4", "train data: different", "val data: the same"):
        assert part in text
    assert models(registry, NAME, "--json") == 0
    assert [row["version"] for row in json.loads(capsys.readouterr().out)] == ["2", "1"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--lineage", "1"], "NAME"),
        ([NAME, "--against", "1"], "--lineage"),
        (["nobody"], NAME),
        ([NAME, "--lineage", "9"], "9"),
        ([NAME, "--lineage", "1", "--against", "rival"], "rival"),
        (["a/b"], "NAME"),
    ],
)
def test_models_wrong_request_exits_2(
    words: list[str], named: str, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert models(registry, *words) == 2
    assert named in capsys.readouterr().err


def test_list_rows_of_a_version_without_run_and_files_shows_them_as_missing(
    registry: Registry, store: TrackingStore
) -> None:
    record = small_run(registry.folder, "lonely")
    register(record, "lonely", "")
    source = registry.client.get_model_version_download_uri("lonely", "1").removeprefix("file://")
    shutil.rmtree(f"{source}/artifacts/checkpoint")
    registry.client.set_model_version_tag("lonely", "1", VAL_DIGEST_TAG, "known")
    registry.client.delete_run(record.run_id)
    (row,) = list_rows(store, "lonely")
    assert (row["bytes"], row["val_digest"], row["run"]) == (None, "known", "lonely")
    assert models(registry, "lonely") == 0
    assert models(registry, "lonely", "--lineage", "1") == 0


def test_models_of_other_tools_do_not_hide_ours(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    """Names with quotes and control characters, tags of another form, files in a store that cannot be read here."""
    client = registry.client
    for name in ("it's", "a' OR name like '%", "both ' and \"", "red\x1b[31m\nsecond"):
        client.create_registered_model(name)
        client.create_model_version(name, "/absent")
    run_id = client.create_run("0", tags={"resumed_with": "other", "resumed_with.1": "[1]"}).info.run_id
    client.create_registered_model("foreign")
    for source in ("http://127.0.0.1:1/model", "/absent"):
        client.create_model_version("foreign", source, run_id=run_id)

    assert models(registry) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("  1 versions" in line for line in lines) >= 4
    assert any(line.startswith(f"{NAME} ") and "@champion = 1" in line for line in lines)
    assert any(line.startswith("red\N{REPLACEMENT CHARACTER}[31m second ") for line in lines)
    assert models(registry, "foreign") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert models(registry, "foreign", "--lineage", "2") == 0
    assert "settings: MLflow has none of its run" in capsys.readouterr().out


def test_lineage_names_a_deleted_run(registry: Registry, store: TrackingStore) -> None:
    record = small_run(registry.folder, "deleted")
    register(record, "deleted", "")
    assert trace(store, "deleted", "1", None)["run"]["deleted"] is False
    registry.client.delete_run(record.run_id)
    tree = trace(store, "deleted", "1", None)
    assert (tree["run"]["id"], tree["run"]["deleted"]) == (record.run_id, True)
    assert f"{record.run_id} (deleted)" in lineage_text(tree)


def test_settings_that_are_one_number_do_not_differ(registry: Registry) -> None:
    """A run that `register` makes has its settings from a record, where 240 is 240.0."""
    assert list_rows(TrackingStore(registry.uri), NAME)[0]["differs_from_champion"].keys() == {"optim.lr"}
    run_id = registry.client.get_model_version(NAME, "2").run_id
    registry.client.set_tag(run_id, "resumed_with.2", json.dumps({"optim.lr": "0.0e-4", "seed": "42.0", "name": "x"}))
    try:
        assert list_rows(TrackingStore(registry.uri), NAME)[0]["differs_from_champion"] == {}
    finally:
        registry.client.delete_tag(run_id, "resumed_with.2")
