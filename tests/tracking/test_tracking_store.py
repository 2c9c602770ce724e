"""The choice of the MLflow store: one order in every command, and errors that name its origin."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.data import write_shards
from support.helpers import tiny_checkpoint, write_image
from support.paths import ROOT

from jobs import demo, evaluate, export, models, predict, promote, register, table, train, weights
from pipeline.config import dump, load_config
from pipeline.errors import ConfigError, RunError, TrackingInputError
from pipeline.runs.record import RunRecord, write_run
from pipeline.tracking.client import connect
from pipeline.tracking.store import TrackingStore, choose_store, how_to_find, pages, with_login
from tune import sweep

LOGIN = "http://me:hunter2%2F@host:5000"
MODEL = "models:/m@champion"
NAMED = ("--tracking-uri", "MLFLOW_TRACKING_URI", "the default")
STARTED = ("tracking.uri", "MLFLOW_TRACKING_URI", "the default")
CONTINUED = ("tracking.uri", "the run's record", "MLFLOW_TRACKING_URI", "the default")
COMMANDS: dict[str, tuple[Any, list[str], tuple[str, ...]]] = {
    "predict": (predict, [MODEL, "a.jpg"], NAMED),
    "evaluate": (evaluate, [MODEL], NAMED),
    "export": (export, [MODEL, "out.onnx"], NAMED),
    "weights": (weights, ["export", MODEL, "out.pth"], NAMED),
    "table": (table, ["demo"], NAMED),
    "register": (register, ["runs/tiny"], ("--tracking-uri", "the run's record", "MLFLOW_TRACKING_URI", "the default")),
    "promote": (promote, ["m"], NAMED),
    "models": (models, ["m"], NAMED),
    "train": (train, ["tiny.yaml"], STARTED),
    "train --resume": (train, ["tiny.yaml", "--resume=must"], CONTINUED),
    "demo": (demo, [], CONTINUED),
    "sweep": (sweep, ["space.yaml"], STARTED),
}
CASES = [(command, place) for command, (_, _, knobs) in COMMANDS.items() for place in range(len(knobs))]


class StoppedError(RunError):
    """The command came to the store."""


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[TrackingStore]:
    """The stores that commands come to, where they stop; the current folder holds what they need before."""
    found: list[TrackingStore] = []

    def stop(store: TrackingStore, **_: Any) -> None:
        found.append(store)
        raise StoppedError(store.knob)

    modules = ("pipeline.registry.register", "pipeline.registry.listing", "pipeline.launch.promotion")
    for module in (*modules, "pipeline.presets.trained"):
        monkeypatch.setattr(f"{module}.connect", stop)
    monkeypatch.setattr("pipeline.launch.preflight.check_experiment", lambda store, _: stop(store))
    monkeypatch.setattr("pipeline.data.sharding.demo_data.make_demo_data", lambda train, val: None)
    write_shards(tmp_path)
    write_image(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    return found


def write_inputs(folder: Path, overrides: Mapping[str, Any], recorded: str | None) -> None:
    """The demo's config under another name, a space over it; also a run of it, unless `recorded` is None."""
    tree = dump(load_config(ROOT / "jobs" / "configs" / "demo.yaml", dict(overrides)))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    space = {"config": "tiny.yaml", "overrides": {"name": "sweep"}, "search": {"method": "random"}}
    space["space"] = {"optim.lr": {"choice": [1e-4]}}
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    if recorded is not None:
        tree["tracking"]["uri"] = recorded
        checkpoint = str(tiny_checkpoint(folder / "runs" / "tiny"))
        write_run(RunRecord("tiny", str(folder / "runs" / "tiny"), tree, status="FAILED", last=checkpoint))


@pytest.mark.parametrize(("command", "place"), CASES)
def test_store_of_every_command_follows_one_rule(
    command: str, place: int, opened: list[TrackingStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, arguments, knobs = COMMANDS[command]
    given = {knob: f"sqlite:///{tmp_path}/{k}.db" for k, knob in enumerate(knobs[place:-1])}
    overrides = {"name": "tiny", "storage": str(tmp_path / "runs"), "model.num_classes": 3, "train.global_batch": 4}
    overrides |= dict.fromkeys(("data.train", "data.val"), str(tmp_path / "shards"))
    write_inputs(tmp_path, overrides, given.get("the run's record", "") if "the run's record" in knobs else None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given.get("MLFLOW_TRACKING_URI", ""))
    if command == "demo":
        arguments = [f"{key}={value}" for key, value in overrides.items()]
    if "tracking.uri" in given:
        arguments = [*arguments, f"tracking.uri={given['tracking.uri']}"]
    if "--tracking-uri" in given:
        arguments = [*arguments, "--tracking-uri", given["--tracking-uri"]]
    with pytest.raises(StoppedError):
        module.run(module.build_parser().parse_intermixed_args(arguments))
    expected = given.get(knobs[place], f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert opened == [TrackingStore(expected, knobs[place])]


@pytest.mark.parametrize(
    ("sources", "knob"),
    [
        ({"flag": "ftp://x"}, "--tracking-uri"),
        ({"setting": "mlruns"}, r"tracking\.uri"),
        ({"record": RunRecord("r", "runs/r", {"tracking": {"uri": "mlruns"}})}, "the run's record"),
        ({}, "MLFLOW_TRACKING_URI"),
    ],
)
def test_address_that_is_none_is_refused_with_the_knob_that_counted(
    sources: dict[str, Any], knob: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///mlruns")
    with pytest.raises(ConfigError, match=f"{knob}: "):
        choose_store(**sources)


@pytest.mark.parametrize("sources", [{"flag": LOGIN}, {"setting": LOGIN}])
def test_address_with_a_login_is_refused_and_not_repeated(sources: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME") as raised:
        choose_store(**sources)
    assert "hunter2" not in str(raised.value)


def test_login_of_the_environment_is_used_but_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", LOGIN)
    store = choose_store()
    assert store == TrackingStore("http://host:5000", "MLFLOW_TRACKING_URI")
    assert with_login("http://other:5000") == "http://other:5000"
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ  # it is not another server's login
    assert with_login(store.uri) == store.uri
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "hunter2/"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@db/mlflow")
    store = choose_store()
    assert store.uri == "postgresql://me@db/mlflow"
    assert with_login(store.uri) == "postgresql://me:hunter2@db/mlflow"


def test_recorded_store_that_is_not_here_makes_no_folder(tmp_path: Path) -> None:
    record = RunRecord("r", "runs/r", {"tracking": {"uri": f"sqlite:///{tmp_path}/gone/mlflow.db"}})
    with pytest.raises(TrackingInputError, match=r"the run's record .*--tracking-uri"):
        connect(choose_store(record=record), create=True)
    assert not list(tmp_path.iterdir())


def test_how_to_find_names_only_a_store_that_commands_do_not_use_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow itself sets it
    other = choose_store(f"sqlite:///{tmp_path}/other.db")
    assert how_to_find(choose_store()) == how_to_find(choose_store(f"sqlite:///{tmp_path}/runs/mlflow.db")) == ""
    assert f"--tracking-uri {other.uri}" in how_to_find(other)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other.uri)
    assert how_to_find(other) == ""


def test_pages_of_a_server_are_its_address() -> None:
    assert pages("http://host:5000") == "http://host:5000"
    assert pages("sqlite:////x/mlflow.db").endswith("mlflow ui --backend-store-uri sqlite:////x/mlflow.db")
