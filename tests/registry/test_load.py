"""load_detector: every name of a model gives the detections that the command and the registered model give."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.helpers import tiny_checkpoint, tiny_config, tiny_run, write_image
from support.paths import ROOT

import pipeline
from jobs.predict import build_parser, run
from pipeline import load_detector
from pipeline.errors import RunError
from pipeline.registry.locate import pin_model
from pipeline.registry.register import register
from pipeline.runs.record import write_run
from pipeline.tracking.client import connect, load_mlflow

USE = """
from pathlib import Path
from pipeline import ImageDetections, Predictor, load_detector
detector: Predictor = load_detector(Path("runs/mine"), device="cpu")
one: ImageDetections = detector("a.jpg", threshold=0.5)
many: list[ImageDetections] = detector([Path("a.jpg"), b""])
wrong: int = detector(["a.jpg"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with `image.jpg`, and the run `runs/mine`, registered as `mine` in the default store."""
    folder = tmp_path_factory.mktemp("mine")
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    (folder / "runs").mkdir()
    connect(uri, create=True)
    record = tiny_run(folder / "runs" / "mine", tiny_config(name="mine", tracking={"uri": uri}))
    write_run(record)
    register(record, "mine", "champion")
    write_image(folder / "image.jpg")
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    found = load_detector(folder / "runs" / "mine" / "checkpoint", device="cpu")(folder / "image.jpg", threshold=0)
    assert len(found) == 60  # of 12 queries and 5 classes
    return found.to_dict()


@pytest.mark.parametrize(
    "name",
    ["models:/mine@champion", "models:/mine/1", "mine", "runs/mine", "runs/mine/run.json", "runs/mine/checkpoint"]
    + [f"runs/mine/checkpoint/{file}" for file in ("model.safetensors", "state.json")],
)
def test_load_detector_by_any_name_gives_the_same_detections(name: str, expected: Any) -> None:
    assert load_detector(name)("image.jpg", threshold=0).to_dict() == expected


def test_load_detector_equals_the_command(expected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(build_parser().parse_args(["models:/mine@champion", "image.jpg", "--json", "--threshold", "0"])) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {key: printed[key] for key in expected} == expected


def test_load_detector_equals_the_registered_model(expected: Any, folder: Path) -> None:
    mlflow = load_mlflow()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/runs/mlflow.db")
    try:
        model = mlflow.pyfunc.load_model("models:/mine@champion")
        assert model.predict([Path("image.jpg").read_bytes()], params={"threshold": 0.0}) == [expected]
    finally:
        mlflow.set_tracking_uri(before)


def test_load_detector_takes_the_store_from_its_argument(expected: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError):
        load_detector("models:/absent@champion", tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    uri = f"sqlite:///{tmp_path}/other.db"
    connect(uri, create=True)
    register(tiny_run(tmp_path / "other"), "other", "champion", uri)
    found = load_detector("models:/other@champion", tracking_uri=uri)("image.jpg", threshold=0)
    assert found.to_dict() == expected  # the same random weights
    with pytest.raises(RunError):
        load_detector("models:/other@champion")


def test_pin_model_names_what_a_name_means_now(folder: Path) -> None:
    """An alias or a run may mean something else later; the pinned name does not."""
    store = f"sqlite:///{folder}/runs/mlflow.db"
    for name in ("models:/mine@champion", "models:/mine/1"):
        assert pin_model(name, None) == ("models:/mine/1", store)
    for name in ("mine", "runs/mine", "runs/mine/run.json", "runs/mine/checkpoint/state.json"):
        assert pin_model(name, None) == (str(folder / "runs/mine/checkpoint"), None)
    with pytest.raises(RunError, match="absent"):
        pin_model("models:/mine@absent", None)


def test_load_detector_unknown_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"weights")
    with pytest.raises(RunError, match=r"jobs\.weights"):
        load_detector(tmp_path / "weights.pth")
    with pytest.raises(RunError, match="absent"):
        load_detector("absent")
    (tiny_checkpoint(tmp_path) / "state.json").unlink()
    with pytest.raises(RunError, match=r"model\.safetensors"):
        load_detector(tmp_path / "checkpoint" / "model.safetensors")


def test_example_of_the_documents_runs(expected: Any) -> None:
    (example,) = re.findall(r"```python\n(.*?load_detector.*?)```", (ROOT / "docs/registry.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/registry.md", "exec"), names)
    assert names["found"].to_dict().keys() == expected.keys()
    assert len(names["several"]) == 3


def test_package_gives_its_public_names_and_no_others() -> None:
    assert set(pipeline.__all__) == {"__version__", *pipeline._MODULES}
    for name in pipeline.__all__:
        assert getattr(pipeline, name) is not None
    with pytest.raises(AttributeError, match="absent"):
        pipeline.absent  # noqa: B018
    assert Path(pipeline.__file__).with_name("py.typed").is_file()


@pytest.mark.slow
def test_public_call_is_typed_strictly(tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(USE)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "use.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if "error" in line and not line.startswith("Found")] == [lines[0]], done.stdout
    assert lines[0].startswith("use.py:7: ")  # only the wrong use


def test_detector_takes_one_image_in_every_form() -> None:
    """One image in all its forms; what a form may hold is tested with `read_image`."""
    array = np.array(Image.open("image.jpg"))
    detector = load_detector("mine")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [Path("image.jpg"), Path("image.jpg").read_bytes(), Image.open("image.jpg"), array, tensor, tensor / 255]
    one, *others = [found.to_dict() for found in detector(forms, threshold=0)]
    assert others == [one] * 5
    assert [detector(form, threshold=0).to_dict() for form in forms] == [one] * 6
