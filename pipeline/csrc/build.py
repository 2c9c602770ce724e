"""Build the operator's library, once per machine: `python -m pipeline.csrc.build [--device cpu|cuda] [--force]`.

The first use of the operator builds it, as do `make op` and the cluster's setup commands. The library is stored in
`$DEFORMABLE_OP_CACHE` (default `~/.cache/deformable_detr_pipeline/ops`). Its folder's name depends on the sources, the
flags, the torch version and the compiler. So another copy of this package on the machine finds it. One process builds
while the others wait for a file lock, which the kernel releases if the builder dies. OpError carries the compiler's
last lines, or what to install.
"""

import argparse
import ctypes
import fcntl
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.csrc.kernels import choose_kernels, requested_kernels
from pipeline.csrc.recipe import DEVICES, SOURCES, Recipe, find_compiler, make_recipe, run_compiler
from pipeline.errors import OpError
from pipeline.files.atomic import rename_durably, write_file
from pipeline.logs import get_logger

LIBRARY = "ms_deform_attn.so"
_LOG = get_logger("csrc.build")


def cache_folder() -> Path:
    """The folder of the built libraries."""
    default = Path("~/.cache/deformable_detr_pipeline/ops").expanduser()
    return Path(os.environ.get("DEFORMABLE_OP_CACHE") or default)


def find(device: str) -> Path | None:
    """The built library for `device`, or None. Without a compiler, a library of any compiler is accepted."""
    compiler = find_compiler(device)
    pattern = f"{device}-{make_recipe(device).key}-{compiler.key if compiler else '*'}/{LIBRARY}"
    return min(cache_folder().glob(pattern), default=None)


def build(device: str = "cpu", force: bool = False) -> Path:
    """Build the library for `device` if it does not exist, or always with `force`; returns its path.

    Raises:
        OpError: there is no compiler, it fails, or the cache folder cannot be written.
    """
    if not force and (found := find(device)):
        return found
    what, compiler = make_recipe(device), find_compiler(device)
    if compiler is None:
        wanted = "a C++ compiler (apt-get install g++)" if device == "cpu" else "the CUDA toolkit (nvcc; $CUDA_HOME)"
        raise OpError(f"the {device} operator is not built and there is nothing to build it with: install {wanted}")
    folder = cache_folder() / f"{device}-{what.key}-{compiler.key}"
    target = folder / LIBRARY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _hold_lock(folder / "lock"):
            if target.exists() and not force:  # another process built it meanwhile
                return target
            for left in folder.glob("build-*"):  # left by a killed builder
                shutil.rmtree(left, ignore_errors=True)
            _LOG.info("building the %s operator with %s, once on this machine: %s", device, compiler.name, target)
            start = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
                library = _compile(what, compiler.path, Path(scratch))
                facts = {
                    "device": device,
                    "compiler": compiler.name,
                    "torch": torch.__version__,
                    "flags": [*what.flags, *(flag for unit in what.units for flag in unit.flags)],
                    "seconds": round(time.monotonic() - start, 1),
                }
                write_file(folder / "build.json", json.dumps(facts, indent=1).encode())
                rename_durably(library, target)
            _LOG.info("built in %.1f s", facts["seconds"])
            return target
    except OSError as error:
        raise OpError(f"cannot write the operator into {folder}: {error}; set DEFORMABLE_OP_CACHE") from error


def facts(library: Path) -> dict[str, Any]:
    """The build's record: device, compiler, torch, flags, seconds."""
    recorded: dict[str, Any] = json.loads((library.parent / "build.json").read_text(encoding="utf-8"))
    return recorded


@functools.cache
def load(device: str) -> Path:
    """Build if needed, and register the kernels for `device` with torch, once per process; returns the library's path.

    Raises:
        OpError: the library cannot be built or loaded.
    """
    path = build(device)
    try:
        torch.ops.load_library(path)
        if device == "cuda":
            choose_kernels(path, requested_kernels())
    except OSError as error:
        command = f"python -m pipeline.csrc.build --device {device} --force"
        raise OpError(f"{path} does not load ({error}); build it again: {command}") from None
    return path


def instruction_set(wanted: str | None = None) -> str:
    """Set the CPU kernels' instruction set to `wanted`, if the processor has it; returns the one in use."""
    entry = ctypes.CDLL(str(load("cpu"))).msda_instruction_set
    entry.argtypes, entry.restype = [ctypes.c_char_p], ctypes.c_char_p
    name: bytes = entry(wanted.encode() if wanted else None)
    return name.decode()


@contextmanager
def _hold_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel releases it when the process ends, even if it is killed."""
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("waiting for another process that builds the operator (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(what: Recipe, compiler: str, scratch: Path) -> Path:
    """Run the recipe in `scratch`: compile the units in parallel, then link."""
    root = Path(torch.__file__).parent
    objects = [str(scratch / f"{unit.name}.o") for unit in what.units]
    calls = [
        [compiler, *what.flags, *unit.flags, "-isystem", f"{root}/include", "-c", f"{SOURCES}/{unit.source}", "-o", out]
        for unit, out in zip(what.units, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run_compiler, calls))
    library = scratch / LIBRARY
    link = [f"-L{root}/lib", *(f"-l{name}" for name in what.libraries)]
    run_compiler([compiler, "-shared", *objects, *link, "-o", str(library)])
    return library


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.csrc.build",
        description="Build the MSDeformAttn library and print where it is.",
        epilog="example:\n  TORCH_CUDA_ARCH_LIST=9.0 python -m pipeline.csrc.build --device cuda",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=DEVICES, help="default: cpu, and cuda where torch sees a GPU")
    parser.add_argument("--force", action="store_true", help="build even if it exists")
    args = parser.parse_args(argv)
    devices = [args.device] if args.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    try:
        for device in devices:
            print(build(device, force=args.force))
    except OpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
