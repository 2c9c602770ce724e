"""A registered version in an environment with nothing but its own requirements: the bits of `load_detector` here.

One environment is made for all tests, by pip and from the version's file of requirements, as MLflow makes it. The
operator is compiled there, from the sources that the version carries.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.data import with_orientation
from support.helpers import tiny_config, tiny_run, write_image

from pipeline.config import dump, from_dict
from pipeline.registry.load import load_detector
from pipeline.registry.register import register
from pipeline.tracking.client import load_mlflow
from pipeline.tracking.run import start_run

MODEL = "models:/clean@champion"
LOAD = """
import importlib.util, json, sys
from importlib.metadata import distributions, packages_distributions
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
images = [open(path, "rb").read() for path in sys.argv[2:]]
found = model.predict(images, params={"threshold": 0.0})
owners = packages_distributions()
imported = {owner for module in sys.modules for owner in owners.get(module, ())}
print(json.dumps({
    "found": found,
    "package": sys.modules["pipeline"].__file__,
    "project": [name for name in ("jobs", "tune") if importlib.util.find_spec(name)],
    "installed": sorted(each.name for each in distributions()),
    "imported": sorted(imported),
}))
"""
TRAINING = {"deepspeed", "hotcoco", "ninja", "optuna", "pycocotools", "ray", "webdataset"}  # of the project's own needs
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the environment holds torch and its GPU libraries


@dataclass(frozen=True)
class Clean:
    """What the process in the clean environment has found."""

    answer: dict[str, Any]
    said: str  # its standard error
    expected: list[Any]  # the detections here
    requirements: list[str]  # lines of the version's file
    operators: Path  # the folder of the operator that was compiled there


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clean]:
    folder = tmp_path_factory.mktemp("clean")
    try:
        yield answer_in(folder)
    finally:
        shutil.rmtree(folder / "environment", ignore_errors=True)  # pytest would keep it for two more runs


def answer_in(folder: Path) -> Clean:
    """Register, install and predict."""
    uri, images = register_version(folder), draw_images(folder)
    requirements = download_requirements(uri)
    start = time.monotonic()
    python = install(folder / "environment", requirements)
    used = sum(path.lstat().st_size for path in (folder / "environment").rglob("*"))
    print(f"installed {used / 2**30:.2f} GiB in {time.monotonic() - start:.0f} s")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"MLFLOW_TRACKING_URI": uri, "DEFORMABLE_OP_CACHE": str(folder / "ops"), "OMP_NUM_THREADS": "1"}
    (folder / "work").mkdir()
    done = subprocess.run(
        [python, "-c", LOAD, MODEL, *images],
        cwd=folder / "work",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    expected = load_detector(MODEL, device="cpu", tracking_uri=uri).predict(images, 0.0)
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return Clean(answer, done.stderr, [*expected], lines, folder / "ops")


def register_version(folder: Path) -> str:
    """A version with random weights that uses the compiled operator; returns the store."""
    uri = f"sqlite:///{folder}/mlflow.db"
    tree = dump(tiny_config(tracking={"uri": uri}))
    tree["model"]["op"] = "cpu"
    config = from_dict(tree)
    register(tiny_run(folder / "run", config, start_run(config.tracking, config, config.name)), "clean", "champion")
    return uri


def draw_images(folder: Path) -> list[Path]:
    """A wide JPEG, a tall PNG, and one that its EXIF tag turns."""
    wide = write_image(folder / "wide.jpg")
    turned = folder / "turned.png"
    turned.write_bytes(with_orientation(Image.open(wide), 6, "PNG"))
    return [wide, write_image(folder / "tall.png", (70, 131), seed=1), turned]


def download_requirements(uri: str) -> Path:
    """The version's file, as MLflow finds it."""
    mlflow = load_mlflow()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        return Path(mlflow.pyfunc.get_model_dependencies(MODEL, format="pip"))
    finally:
        mlflow.set_tracking_uri(before)


def install(folder: Path, requirements: Path) -> Path:
    """An environment with the requirements; returns its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    call = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-compile", "-r", str(requirements)]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return python


def test_clean_environment_has_the_detections_of_load_detector(clean: Clean) -> None:
    assert clean.answer["found"] == clean.expected  # bit for bit: a float's text gives the float again
    assert min(len(found["scores"]) for found in clean.expected) > 0
    assert Path(clean.answer["package"]).parts[-3] == "code"  # the version's own copy
    assert clean.answer["project"] == []
    assert len([*clean.operators.rglob("*.so")]) == 1
    assert "mismatch" not in clean.said, "MLflow compares the environment with the version's requirements"


def test_requirements_name_only_what_a_prediction_imports(clean: Clean) -> None:
    named = {line.partition("==")[0].lower() for line in clean.requirements}
    assert named - {name.lower() for name in clean.answer["imported"]} == set()
    assert TRAINING & {name.lower() for name in clean.answer["installed"]} == set()
