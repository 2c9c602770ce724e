"""The build: content of the key, one builder at a time, killed builders, broken and missing compilers.

A script replaces the compiler in most of these tests, so that they are fast. test_sampling.py and test_cuda_compiles.py
use real compilers.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.csrc import build, recipe
from pipeline.errors import OpError

COMPILER = """#!/bin/sh
case "$*" in
  *--version*) echo "play 1.0"; exit 0;;
  *-dumpmachine*) echo "here"; exit 0;;
esac
echo "$*" >> {log}
{body}
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo library > "$2"; fi; shift; done
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEFORMABLE_OP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def play_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str = "") -> Path:
    """Make $CXX a script that runs `body` and writes its output file; the file that lists its calls."""
    path, log = folder / "play-c++", folder / "calls"
    path.write_text(COMPILER.format(log=log, body=body))
    path.chmod(0o755)
    log.write_text("")
    monkeypatch.setenv("CXX", str(path))
    return log


def test_build_many_threads_build_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = play_compiler(tmp_path, monkeypatch, "sleep 0.2")
    assert build.find("cpu") is None
    with ThreadPoolExecutor(4) as pool:  # a file lock holds between threads too: each opens the file anew
        paths = set(pool.map(lambda _: build.build("cpu"), range(4)))
    calls = len(recipe.make_recipe("cpu").units) + 1  # and the link
    assert len(log.read_text().splitlines()) == calls
    (path,) = paths
    assert path == build.find("cpu")
    assert path.is_relative_to(cache)
    assert sorted(p.name for p in path.parent.iterdir()) == ["build.json", "lock", "ms_deform_attn.so"]
    assert build.facts(path)["compiler"] == "play 1.0"
    assert build.build("cpu") == path
    assert len(log.read_text().splitlines()) == calls
    assert build.build("cpu", force=True) == path
    assert len(log.read_text().splitlines()) == 2 * calls


def test_recipe_key_changes_with_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the sources has the same key, as when Ray unpacks a working directory; an edit or a flag another."""
    cpu, cuda = recipe.make_recipe("cpu").key, recipe.make_recipe("cuda").key
    assert cpu != cuda
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert recipe.make_recipe("cpu").key == cpu
    assert recipe.make_recipe("cuda").key != cuda
    copy = tmp_path / "csrc"
    shutil.copytree(recipe.SOURCES, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(recipe, "SOURCES", copy)
    assert recipe.make_recipe("cpu").key == cpu
    with (copy / "ms_deform_attn.cuh").open("a") as file:
        file.write("// edited\n")
    assert recipe.make_recipe("cpu").key == cpu
    with (copy / "ms_deform_attn.h").open("a") as file:
        file.write("// edited\n")
    assert recipe.make_recipe("cpu").key != cpu


def test_build_killed_builder_blocks_nobody(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = play_compiler(tmp_path, monkeypatch, f"if [ -e {tmp_path / 'slow'} ]; then sleep 600; fi")
    (tmp_path / "slow").touch()
    code = (
        "import pipeline.model.ops.sampling, pipeline.csrc.build as build\n"
        "assert build.load.cache_info().currsize == 0, 'importing loads the library'\n"
        "build.build('cpu')"
    )
    builder = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not log.read_text() and time.monotonic() < deadline:
            assert builder.poll() is None
            time.sleep(0.05)
        os.kill(builder.pid, signal.SIGKILL)  # its compilers live on, as after a node's OOM killer
        builder.wait()
        (folder,) = cache.iterdir()
        assert list(folder.glob("build-*"))
        (tmp_path / "slow").unlink()
        assert build.build("cpu").exists()
        assert not list(folder.glob("build-*"))
    finally:
        os.killpg(builder.pid, signal.SIGKILL)


def test_build_failing_compiler_is_quoted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_compiler(tmp_path, monkeypatch, "echo 'error: no such instruction' >&2; exit 1")
    with pytest.raises(OpError, match=r"no such instruction(.|\n)*CXX=") as error:
        build.build("cpu")
    assert error.value.exit_code == 2
    assert build.find("cpu") is None
    (folder,) = cache.iterdir()
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_build_without_compiler_names_package(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built library is used; without one the error says what to install."""
    play_compiler(tmp_path, monkeypatch)
    built = build.build("cpu")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert build.find("cpu") == built
    built.unlink()
    with pytest.raises(OpError, match=r"g\+\+"):
        build.build("cpu")


def test_build_unwritable_cache_names_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_compiler(tmp_path, monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEFORMABLE_OP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OpError, match="DEFORMABLE_OP_CACHE"):
        build.build("cpu")


def test_load_damaged_library_names_command(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_compiler(tmp_path, monkeypatch)
    build.load.cache_clear()
    try:
        with pytest.raises(OpError, match=r"\.so(.|\n)*--force"):
            build.load("cpu")
    finally:
        build.load.cache_clear()


def test_make_recipe_bad_request_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OpError, match="'tpu'"):
        recipe.make_recipe("tpu")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(OpError, match=r"TORCH_CUDA_ARCH_LIST.*'Hopper'"):
        recipe.make_recipe("cuda")


def test_command_prints_path(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    play_compiler(tmp_path, monkeypatch)
    assert build.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(build.find("cpu"))
    play_compiler(tmp_path, monkeypatch, "exit 1")
    assert build.main(["--device", "cpu", "--force"]) == 2
    assert "error: the operator does not build" in capsys.readouterr().err
    assert build.find("cpu")  # a failed rebuild leaves the old one


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils) to list symbols with")
def test_library_uses_only_stable_abi() -> None:
    """The library needs no C++ symbol of torch, so other torch versions can load it."""
    done = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", str(build.build("cpu"))], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in done.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [
        name for name in names if name.startswith("_Z") and ("c10" in name or "2at" in name or "5torch" in name)
    ]
