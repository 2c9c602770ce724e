"""The operator's sources compile against the headers of the oldest torch that pyproject.toml allows.

The headers come out of the smallest wheel of that version, one for another platform (80 MB). No GPU is needed.
"""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

from pipeline.csrc.recipe import SOURCES, find_compiler, make_recipe, run_compiler


def oldest_torch() -> str:
    """The lower bound of the requirement, such as `2.11.0`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = (found[1] for text in project["dependencies"] if (found := re.match(r"torch>=([\d.]+)", text)))
    return bound + ".0" * (2 - bound.count("."))


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch/include of that version."""
    folder = tmp_path_factory.mktemp("torch")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--platform", "macosx_11_0_arm64", "--python-version", "3.11", f"torch=={oldest_torch()}"]
    done = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True, check=False, timeout=300)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"no wheel of torch {oldest_torch()} to be had here: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("torch/include/")]
        wheel.extractall(folder, names)
    wheels[0].unlink()
    return folder / "torch" / "include"


def test_cpu_source_compiles_against_the_oldest_torch(headers: Path) -> None:
    compiler = find_compiler("cpu")
    if compiler is None:
        pytest.skip("no C++ compiler")
    what = make_recipe("cpu")
    for unit in what.units[:1]:  # the others see no torch
        source = str(SOURCES / unit.source)
        run_compiler([compiler.path, *what.flags, *unit.flags, "-isystem", str(headers), "-fsyntax-only", source])


def test_cuda_source_compiles_against_the_oldest_torch(headers: Path, tmp_path: Path) -> None:
    compiler = find_compiler("cuda")
    if compiler is None:
        pytest.skip("no nvcc (install the CUDA toolkit)")
    what = make_recipe("cuda")
    flags = [flag for flag in what.flags if not flag.startswith(("--threads", "-O3"))]
    source = str(SOURCES / what.units[0].source)
    options = ["-arch=sm_90", "-O0", "-Xcicc", "-O0", "-isystem", str(headers)]
    run_compiler([compiler.path, *flags, *options, "-c", source, "-o", f"{tmp_path}/op.o"])
