"""The wheel, installed outside of the source tree: what it holds, its commands, the operator, a training of two steps.

Every test runs in two environments. `borrowed` has the wheel alone and takes all other packages from the environment of
the tests. Its operator comes from the shared cache, whose key covers the sources: an equal key proves equal sources.
`complete` (slow) installs every dependency and compiles the operator into an empty cache.
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.data import write_shards
from support.paths import ROOT

import pipeline
from jobs.ddetr import COMMANDS
from pipeline.csrc import build
from pipeline.runs.record import read_run

PACKAGES = ("pipeline", "jobs", "tune")
NOT_PACKED = shutil.ignore_patterns("__pycache__", "*.so")
WHERE = "import pipeline, jobs, tune; print(pipeline.__file__, jobs.__file__, tune.__file__)"
SMALL = (
    "model.num_classes=3", "model.hidden_dim=32", "model.heads=4", "model.ffn_dim=32", "model.queries=10",
    "model.backbone.width=8", "model.op=cpu", "data.augment.scales=[96]", "data.augment.eval_size=96",
    "data.augment.max_size=160", "train.max_steps=2", "train.global_batch=4", "train.micro_batch=2",
    "scaling.num_workers=1", "scaling.use_gpu=false", "evaluation.where=inline",
)  # fmt: skip
pytestmark = [
    pytest.mark.timeout(1800),  # a complete installation is 6 GB
    pytest.mark.ray,  # all of it, so that one process of pytest-xdist builds the one wheel
]


@dataclass(frozen=True)
class Installed:
    """An environment that has the wheel, and a folder outside of the tree to work in."""

    python: Path
    folder: Path
    variables: dict[str, str]

    def run(self, command: str, *words: str) -> str:
        """What a command of the environment prints; it must succeed."""
        call = [str(self.python.with_name(command)), *words]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | self.variables
        done = subprocess.run(call, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


def pip(*words: str, python: Path = Path(sys.executable)) -> None:
    call = [sys.executable, "-m", "pip", "--python", str(python), *words]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no `build` folder is left in the tree or taken from it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=NOT_PACKED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    options = ("--no-build-isolation", "--no-deps", "--no-index")
    pip("wheel", *options, "--wheel-dir", str(folder), str(folder / "source"))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module", params=["borrowed", pytest.param("complete", marks=pytest.mark.slow)])
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    (folder / "work").mkdir()
    if request.param == "borrowed":
        pip("install", "--no-deps", "--no-index", "--no-compile", str(wheel), python=python)
        (packages,) = folder.glob("env/lib/*/site-packages")
        # Paths alone: with them come no .pth files, so not the editable installation of the tree either.
        borrowed = [path for path in sys.path if path.endswith("-packages")]
        (packages / "borrowed.pth").write_text("\n".join(borrowed))
        return Installed(python, folder / "work", {})
    pins = ("install", "-c", "constraints.txt", "--no-build-isolation")
    pip(*pins, "setuptools", "wheel", "ninja", "torch", "torchvision", python=python)
    pip(*pins, str(wheel), python=python)
    return Installed(python, folder / "work", {"DEFORMABLE_OP_CACHE": str(folder / "ops")})


def test_wheel_holds_every_file_of_its_packages_and_nothing_else(wheel: Path) -> None:
    source = wheel.parent / "source"
    expected = {
        str(path.relative_to(source))
        for name in PACKAGES
        for path in (source / name).rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    assert {"pipeline/py.typed", "jobs/configs/demo.yaml", "tune/spaces/demo.yaml"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert packed == expected
        assert [name for name in packed if archive.read(name) != (source / name).read_bytes()] == []
    assert wheel.name == f"deformable_detr_pipeline-{pipeline.__version__}-py3-none-any.whl"


def test_every_command_shows_its_help_outside_of_the_tree(installed: Installed) -> None:
    for file in installed.run("python", "-c", WHERE).split():
        assert Path(file).is_relative_to(installed.python.parents[1])
    assert installed.run("ddetr", "--version") == f"ddetr {pipeline.__version__}\n"
    listed = installed.run("ddetr", "--help")
    with ThreadPoolExecutor(2) as pool:
        pages = dict(
            zip(COMMANDS, pool.map(lambda name: installed.run("ddetr", name, "--help"), COMMANDS), strict=True)
        )
    for name, page in pages.items():
        assert f"\n  {name} " in listed
        assert page.startswith(f"usage: ddetr {name} ")
        assert f"ddetr {name}" in page.partition("example:")[2]
    assert installed.run("python", "-m", "jobs.train", "--help").startswith("usage: python -m jobs.train")


def test_operator_is_built_from_the_sources_in_the_wheel(installed: Installed) -> None:
    library = Path(installed.run("python", "-m", "pipeline.csrc.build", "--device", "cpu").strip())
    assert library.is_file()
    assert library.parent.name == build.build("cpu").parent.name  # the key over sources, flags, torch and compiler


def test_two_steps_are_trained_and_registered(installed: Installed, tmp_path: Path) -> None:
    data = write_shards(tmp_path).folder
    settings = ("name=first", f"data.train={data}", f"data.val={data}", "tracking.register_as=first")
    installed.run("ddetr", "train", "demo", *settings, *SMALL)
    record = read_run(str(installed.folder / "runs" / "first"))
    assert record.status == "FINISHED"
    assert "val/AP" in record.metrics
    # A registered version carries a copy of the package, taken from where the package is installed.
    (model,) = (installed.folder / "runs" / "mlartifacts").rglob("MLmodel")
    (package,) = installed.python.parents[1].glob("lib/*/site-packages/pipeline")
    assert names(model.parent / "code" / "pipeline") == names(package)


def names(folder: Path) -> set[str]:
    paths = folder.rglob("*")
    return {str(path.relative_to(folder)) for path in paths if path.is_file() and path.suffix != ".pyc"}
