"""A checkpoint becomes one version, found again by alias or number, that MLflow alone can load and run."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pandas
import pytest
from mlflow import MlflowClient
from PIL import Image
from support.data import with_orientation
from support.helpers import METRICS, NAMES, tiny_checkpoint, tiny_config, tiny_run, write_image
from support.paths import ROOT

from pipeline.checkpoint import OPTIMIZER, load_inference
from pipeline.errors import CheckpointError, InputError, RunError, TrackingError
from pipeline.inference.predictor import Predictor
from pipeline.registry.register import register, resolve
from pipeline.runs.record import RunRecord
from pipeline.tracking.client import connect, load_mlflow
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.run import start_run

NAME = "tiny-detector"
LOAD = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
jpeg = open(sys.argv[2], "rb").read()
found = model.predict([jpeg], params={"threshold": 0.0})
unlisted = sorted({"ray", "deepspeed", "webdataset", "pycocotools"} & set(sys.modules))
print(json.dumps({"found": found, "unlisted": unlisted, "package": sys.modules["pipeline"].__file__}))
"""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="module")
def record(uri: str, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    config = tiny_config(tracking={"uri": uri})
    run_id = start_run(config.tracking, config, config.name)
    assert run_id is not None
    with RunLogger(uri, run_id) as log:
        log.metrics({"val/AP_class/10": 0.25, "val/AP_class/20": 0.5}, 3)
        log.metrics({"val/AP_class/10": 0.375}, 7)
    return tiny_run(tmp_path_factory.mktemp("run"), config, run_id)


@pytest.fixture(scope="module")
def client(uri: str, record: RunRecord) -> Any:
    return connect(uri)


@pytest.fixture(scope="module")
def version(record: RunRecord) -> str:
    return register(record, NAME, "champion")


@pytest.fixture(scope="module")
def model(uri: str, version: str) -> Any:
    mlflow = load_mlflow()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)  # a user's process says where the registry is; the project itself never does
    yield mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    mlflow.set_tracking_uri(before)


def aliases(client: Any) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(NAME).aliases.items()}


def test_register_version_has_tags_and_description(client: Any, record: RunRecord, version: str) -> None:
    found = client.get_model_version_by_alias(NAME, "champion")
    assert str(found.version) == version
    assert found.run_id == record.run_id
    assert float(found.tags["val/AP"]) == METRICS["AP"]
    assert float(found.tags["val/AP_small"]) == METRICS["AP_small"]
    assert json.loads(found.tags["categories"]) == list(NAMES)
    assert found.tags["run"] == record.name
    assert found.tags["data_digest"] == "digest-of-the-shards"
    assert "AP 0.2500" in found.description
    assert found.current_stage == "None"


def test_logged_model_names_its_version_and_its_metrics(client: Any, record: RunRecord, version: str) -> None:
    """MLflow's page of the model reads both."""
    outputs = client.get_run(record.run_id).outputs.model_outputs
    found = client.get_logged_model(outputs[0].model_id)
    assert json.loads(found.tags["mlflow.modelVersions"]) == [{"name": NAME, "version": version}]
    values = {metric.key: metric.value for metric in found.metrics}
    assert values == {f"val/{key}": value for key, value in METRICS.items()} | {"val/AP_class/10": 0.375}
    points = client.get_metric_history(record.run_id, "val/AP_class/10")
    assert [(point.step, point.value) for point in points] == [(3, 0.25), (7, 0.375)]  # none is doubled


def test_register_unevaluated_checkpoint_has_no_ap(
    client: Any, record: RunRecord, version: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path, seed=2)
    number = register(replace(record, best=None, last=str(folder)), "between", "challenger")
    registered = client.get_model_version("between", number)
    assert not [key for key in registered.tags if key.startswith("val/")]
    assert "not evaluated" in registered.description


def test_register_same_checkpoint_keeps_its_version(
    client: Any, record: RunRecord, version: str, tmp_path: Path
) -> None:
    assert register(record, NAME, "challenger") == version
    assert register(record, NAME, "") == version
    assert aliases(client) == {"champion": version, "challenger": version}
    other = replace(record, best=str(tiny_checkpoint(tmp_path, seed=1, config=tiny_config())))
    second = register(other, NAME, "challenger")
    assert int(second) == int(version) + 1
    assert aliases(client) == {"champion": version, "challenger": second}


def test_register_whose_answer_is_lost_makes_one_version(
    client: Any, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client sends a request again if the server ends between its work and its answer."""
    create = type(client).create_model_version

    def twice(self: Any, *arguments: Any, **named: Any) -> Any:
        create(self, *arguments, **named)
        return create(self, *arguments, **named)

    monkeypatch.setattr(type(client), "create_model_version", twice)
    assert register(record, "once", "challenger") == "1"
    assert [found.version for found in client.search_model_versions("name='once'")] in ([1], ["1"])
    assert str(client.get_registered_model("once").aliases["challenger"]) == "1"


def test_register_as_champion_keeps_the_one_before_and_says_that_nothing_was_compared(
    client: Any, record: RunRecord, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = replace(record, best=str(tiny_checkpoint(tmp_path, seed=3)))
    with caplog.at_level("INFO", "pipeline"):
        first, second = register(record, "used", "champion"), register(other, "used", "champion")
        assert register(other, "used", "champion") == second
    said = [entry.message for entry in caplog.records if "nothing was compared" in entry.message]
    assert [f"version {number}" in text for number, text in zip((first, second), said, strict=True)] == [True, True]
    found = client.get_registered_model("used").aliases
    assert {alias: str(number) for alias, number in found.items()} == {"champion": second, "previous": first}


def test_register_as_champion_interrupted_between_its_writes_keeps_the_version_before(
    client: Any, record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [replace(record, best=str(tiny_checkpoint(tmp_path / str(seed), seed=seed))) for seed in (3, 4)]
    first, second = register(record, "kept", "champion"), register(others[0], "kept", "champion")
    write = MlflowClient.set_registered_model_alias

    def interrupt(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if alias == "champion":
            raise KeyboardInterrupt
        write(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", interrupt)
    with pytest.raises(KeyboardInterrupt):
        register(others[1], "kept", "champion")
    found = client.get_registered_model("kept").aliases
    assert {alias: str(number) for alias, number in found.items()} == {"champion": second, "previous": first}


def test_resolve_gives_the_checkpoint_without_optimizer(uri: str, record: RunRecord, version: str) -> None:
    names = (f"models:/{NAME}@champion", f"models:/{NAME}/{version}")
    with resolve(names[0], uri) as folder, resolve(names[1], uri) as same:
        assert folder == same
        assert not (folder / OPTIMIZER).exists()
        assert load_inference(folder).state == load_inference(record.checkpoint).state


def test_resolve_version_in_bucket_is_a_temporary_copy(
    uri: str, record: RunRecord, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(source: str, dst_path: str, tracking_uri: str) -> str:
        assert (source, tracking_uri) == ("s3://bucket/model/artifacts/checkpoint", uri)
        return shutil.copytree(record.checkpoint, f"{dst_path}/checkpoint")

    monkeypatch.setattr(load_mlflow().MlflowClient, "get_model_version_download_uri", lambda *_: "s3://bucket/model")
    monkeypatch.setattr(load_mlflow().artifacts, "download_artifacts", download)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with resolve(f"models:/{NAME}/{version}", uri) as folder:
        assert load_inference(folder).state == load_inference(record.checkpoint).state
        assert folder.is_relative_to(tmp_path)
    with pytest.raises(OSError, match="of the caller"), resolve(f"models:/{NAME}/{version}", uri):
        raise OSError("of the caller")  # no fault of the store
    assert list(tmp_path.iterdir()) == []


def test_resolve_unknown_name_lists_existing_ones(uri: str, version: str, tmp_path: Path) -> None:
    def find(name: str, store: str = uri) -> None:
        with resolve(name, store):
            raise AssertionError(f"there is no {name}")

    with pytest.raises(RunError, match=f"no-such-model.*{NAME}"):
        find("models:/no-such-model@champion")
    with pytest.raises(RunError, match=rf"'winner'.*\b{version}\b.*@champion = {version}"):
        find(f"models:/{NAME}@winner")
    with pytest.raises(RunError, match=r"\b77\b.*\b1$"):
        find(f"models:/{NAME}/77")
    for wrong in (f"models:/{NAME}", f"models:/{NAME}/champion", "models:/", f"{NAME}@champion"):
        with pytest.raises(RunError, match="models:/NAME@ALIAS"):
            find(wrong)
    with pytest.raises(TrackingError, match=r"none\.db"):
        find(f"models:/{NAME}@champion", f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())


def test_register_invalid_name_raises(record: RunRecord) -> None:
    for name in ("", "a/b", "a:b", "it's"):
        with pytest.raises(RunError, match="model"):
            register(record, name, "champion")
    for alias in ("latest", "v3", "a b", "a@b"):
        with pytest.raises(RunError, match=f"'{alias}'"):
            register(record, NAME, alias)


def test_register_run_without_checkpoint_raises(record: RunRecord, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=record.name):
        register(replace(record, best=None, last=None), NAME, "champion")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        register(replace(record, best=str(tmp_path)), NAME, "champion")


def test_register_run_unknown_to_mlflow_creates_one(client: Any, record: RunRecord, version: str) -> None:
    late = replace(record, run_id=None, name="late")
    number = register(late, "late-model", "champion")
    run = client.get_run(client.get_model_version("late-model", number).run_id)
    assert run.info.run_name == "late"
    assert run.info.status == "FINISHED"
    assert register(late, "late-model", "champion") == number


def test_pyfunc_predicts_from_files_frames_base64_and_arrays(model: Any, record: RunRecord, tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg")
    jpeg = path.read_bytes()
    expected = Predictor(load_inference(record.checkpoint), "cpu").predict([path], 0.0, 7)
    params = {"threshold": 0.0, "top_k": 7}
    text = base64.b64encode(jpeg).decode()
    opened, array = Image.open(path), np.array(Image.open(path))
    lists = ([jpeg], [text], [opened], [array], pandas.Series([array]), pandas.DataFrame({"any": [text]}), array[None])
    for value in (jpeg, text, opened, array, *lists):
        assert model.predict(value, params=params) == expected
    assert len(model.predict([jpeg, jpeg])) == 2
    turned = with_orientation(opened, 6, "PNG")
    shown, stored = (model.predict(turned, params={**params, "exif": exif})[0] for exif in ("apply", "ignore"))
    assert stored == expected[0]
    assert shown == model.predict(np.rot90(array, -1), params=params)[0]
    with pytest.raises(InputError, match="row 1"):
        model.predict([jpeg, None])


def test_served_model_reads_no_files(model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="base64"):
        model.predict([str(write_image(tmp_path / "a.jpg"))])


def test_signature_and_requirements_are_explicit(model: Any) -> None:
    signature = model.metadata.signature
    assert signature.inputs is None  # MLflow would decode or refuse what `request.py` takes
    assert signature.outputs.input_names() == ["boxes", "scores", "labels", "category_ids"]
    assert {param.name for param in signature.params.params} == {"threshold", "top_k", "exif"}


@pytest.mark.parametrize("where", ["project", "elsewhere"])
def test_fresh_process_loads_it_by_alias(where: str, uri: str, record: RunRecord, version: str, tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, f"models:/{NAME}@champion", str(path)],
        cwd=ROOT if where == "project" else tmp_path,
        env={**env, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = Predictor(load_inference(record.checkpoint), "cpu").predict([path], 0.0)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["unlisted"] == []  # what the version's requirements do not name
    assert Path(answer["package"]).parts[-3] == "code"  # the version's own copy, not this project's
    (found,) = answer["found"]
    assert found["labels"] == expected[0]["labels"]
    np.testing.assert_allclose(found["boxes"], expected[0]["boxes"], rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def server(uri: str, version: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `mlflow models serve` answers for the champion, in an environment like this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    host, port = address.split(":")
    command = ["models", "serve", "-m", f"models:/{NAME}@champion", "--env-manager", "local", "-h", host, "-p", port]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # MLflow starts uvicorn by its name
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command],
            cwd=log.parent,
            env={**env, "PATH": path, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 300
            while not answers(f"http://{address}/ping"):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield f"http://{address}/invocations"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers as well
            process.wait()


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def post(url: str, **body: Any) -> tuple[int, Any]:
    data = json.dumps({**body, "params": {"threshold": 0.0, "top_k": 3}}).encode()
    try:
        with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=300) as answer:
            return answer.status, json.loads(answer.read())["predictions"]
    except HTTPError as error:
        return error.code, error.read().decode()


def test_served_model_takes_all_four_request_forms(server: str, record: RunRecord, tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", (12, 9))
    (expected,) = Predictor(load_inference(record.checkpoint), "cpu").predict([path], 0.0, 3)
    file, array = path.read_bytes(), np.array(Image.open(path)).tolist()
    text = base64.b64encode(file).decode()
    for value in (text, base64.encodebytes(file).decode(), f"data:image/png;base64,{text}", array):
        for body in (
            {"dataframe_split": {"columns": ["image"], "data": [[value], [value]]}},
            {"dataframe_records": [{"image": value}, {"image": value}]},
            {"inputs": [value, value]},
            {"inputs": {"image": [value, value]}},
            {"instances": [value, value]},
            {"instances": [{"image": value}, {"image": value}]},
        ):
            status, found = post(server, **body)
            assert status == 200, found
            assert [each["labels"] for each in found] == [expected["labels"]] * 2
            np.testing.assert_allclose(found[1]["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)
    for wrong in (None, "not base64!", "/etc/hostname"):
        rows = [{"image": text}, {"image": wrong}]
        for body in ({"inputs": [text, wrong]}, {"dataframe_records": rows}, {"instances": rows}):
            status, found = post(server, **body)
            assert status == 400
            assert "row 1" in found
