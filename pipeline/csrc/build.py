"""Build the operator's library, once per machine: `python -m pipeline.csrc.build [--device cpu|cuda] [--force]`.

Used by `pipeline.model.ops` on first use, by `make op`, by cluster setup commands and by `jobs.doctor`. The library
goes to `$DEFORMABLE_OP_CACHE` (default `~/.cache/deformable_detr_pipeline/ops`), in a folder named after the content of
the sources, the flags, the torch version and the compiler, so a copy of this package elsewhere on the machine finds it.
One process builds while the others wait on a file lock that the kernel drops if the builder dies. It fails with
OpError, whose message carries the compiler's last lines and what to install.
"""

import argparse
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import OpError
from pipeline.runtime import get_logger

SOURCES = Path(__file__).parent
DEVICES = ("cpu", "cuda")
DEFAULT_ARCHS = "7.5;8.0;9.0+PTX"  # not asked from the GPU: a node without one builds the same library
TIMEOUT = 1200.0  # seconds for one compiler call
_TARGET = "-DTORCH_TARGET_VERSION=0x020A000000000000"  # the stable ABI of torch 2.10: newer ones load it too
_INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}


@dataclass(frozen=True)
class Unit:
    """One compiler call: a source file, the name of its object file, the flags of its own."""

    source: str
    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """All that decides what a library contains."""

    device: str
    flags: tuple[str, ...]
    units: tuple[Unit, ...]
    libraries: tuple[str, ...]

    @property
    def key(self) -> str:
        """Sixteen hex digits over sources, flags, torch and machine."""
        digest = hashlib.sha256(repr((self, torch.__version__, sys.platform, platform.machine())).encode())
        for path in sorted(SOURCES.iterdir()):
            if path.suffix in {".h", ".cpp"} or (path.suffix in {".cu", ".cuh"} and self.device == "cuda"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]


def recipe(device: str) -> Recipe:
    """The recipe for `device` on this machine; `$TORCH_CUDA_ARCH_LIST` narrows the GPU architectures."""
    if device == "cuda":
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
        flags = ("-std=c++20", "-O3", "-DUSE_CUDA", _TARGET, "-Xcompiler=-fPIC", "-lineinfo", "--threads=0")
        unit = Unit("ms_deform_attn_cuda.cu", "cuda", tuple(_gencode(archs)))
        return Recipe("cuda", flags, (unit,), ("torch_cuda", "torch_cpu"))
    if device != "cpu":
        raise OpError(f"there is no operator for device '{device}', only for {' and '.join(DEVICES)}")
    x86 = platform.machine() in {"x86_64", "AMD64"}
    flags = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
    entry = Unit("ms_deform_attn_cpu.cpp", "entry", (_TARGET, *(["-DMSDA_X86"] if x86 else [])))
    kernels = tuple(
        Unit("ms_deform_attn_cpu_kernel.cpp", name, (f"-DMSDA_ISA={name}", *options))
        for name, options in _INSTRUCTION_SETS.items()
        if x86 or not options
    )
    return Recipe("cpu", flags, (entry, *kernels), ("torch_cpu",))


def _gencode(archs: str) -> Iterator[str]:
    """`8.0;9.0+PTX` as nvcc's options."""
    for arch in archs.replace(",", ";").replace(" ", ";").split(";"):
        if not arch:
            continue
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number[:-1].isdigit() and not number.isdigit():
            raise OpError(f"TORCH_CUDA_ARCH_LIST holds '{arch}'; write numbers such as '{DEFAULT_ARCHS}'")
        yield f"-gencode=arch=compute_{number},code=sm_{number}"
        if arch.endswith("+PTX"):
            yield f"-gencode=arch=compute_{number},code=compute_{number}"


def compiler(device: str) -> str | None:
    """Path of the compiler for `device` (`$CXX`, or nvcc of `$CUDA_HOME`, come first); None if there is none."""
    if device == "cpu":
        names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    else:
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
        names = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where libraries are kept."""
    default = Path("~/.cache/deformable_detr_pipeline/ops").expanduser()
    return Path(os.environ.get("DEFORMABLE_OP_CACHE") or default)


def find(device: str) -> Path | None:
    """The library for `device` if it was built already. Without a compiler, that of any compiler will do."""
    key, used = recipe(device).key, compiler(device)
    suffix = _compiler_id(used)[0] if used else "*"
    return next(iter(sorted(cache_folder().glob(f"{device}-{key}-{suffix}/ms_deform_attn.so"))), None)


def build(device: str = "cpu", force: bool = False) -> Path:
    """Path of the library for `device`, built if it is not there (or `force`).

    Raises:
        OpError: there is no compiler, it fails, or the cache folder cannot be written.
    """
    if not force and (found := find(device)):
        return found
    what, path = recipe(device), compiler(device)
    if path is None:
        wanted = "a C++ compiler (apt-get install g++)" if device == "cpu" else "the CUDA toolkit (nvcc; $CUDA_HOME)"
        raise OpError(f"the {device} operator is not built and there is nothing to build it with: install {wanted}")
    compiler_id, compiler_name = _compiler_id(path)
    folder = cache_folder() / f"{device}-{what.key}-{compiler_id}"
    log = get_logger("csrc.build")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            target = folder / "ms_deform_attn.so"
            if target.exists() and not force:  # another process was quicker
                return target
            for left in folder.glob("build-*"):  # of a builder that was killed
                shutil.rmtree(left, ignore_errors=True)
            log.info("building the %s operator with %s, once on this machine: %s", device, compiler_name, target)
            start = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
                library = _compile(what, path, Path(scratch))
                facts = {
                    "device": device,
                    "compiler": compiler_name,
                    "torch": torch.__version__,
                    "flags": [*what.flags, *(flag for unit in what.units for flag in unit.flags)],
                    "seconds": round(time.monotonic() - start, 1),
                }
                (folder / "build.json").write_text(json.dumps(facts, indent=1))
                library.replace(target)
            log.info("built in %.1f s", facts["seconds"])
            return target
    except OSError as error:
        raise OpError(f"cannot write the operator into {folder}: {error}; set DEFORMABLE_OP_CACHE") from error


def facts(library: Path) -> dict[str, Any]:
    """What is recorded about a built library: device, compiler, torch, flags, seconds."""
    recorded: dict[str, Any] = json.loads((library.parent / "build.json").read_text())
    return recorded


@functools.cache
def load(device: str) -> Path:
    """Build if needed and register the kernels for `device` with torch, once per process; the library's path.

    Raises:
        OpError: it cannot be built or loaded.
    """
    path = build(device)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise OpError(
            f"{path} does not load ({error}); python -m pipeline.csrc.build --device {device} --force"
        ) from None
    return path


def instruction_set(wanted: str | None = None) -> str:
    """The instruction set of the CPU kernels in this process, after setting it to `wanted` if the processor has it."""
    entry = ctypes.CDLL(str(load("cpu"))).msda_instruction_set
    entry.argtypes, entry.restype = [ctypes.c_char_p], ctypes.c_char_p
    name: bytes = entry(wanted.encode() if wanted else None)
    return name.decode()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel releases it when its holder ends, however that happens."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            get_logger("csrc.build").info("waiting for another process that builds the operator (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _compiler_id(path: str) -> tuple[str, str]:
    """Eight hex digits over version and target of a compiler, and its version line."""
    text = _run([path, "--version"]) + ("" if path.endswith("nvcc") else _run([path, "-dumpmachine"]))
    lines = [line for line in text.splitlines() if line.strip()]
    name = next((line for line in lines if "release" in line), lines[0] if lines else path)
    return hashlib.sha256(text.encode()).hexdigest()[:8], name.strip()


def _compile(what: Recipe, path: str, scratch: Path) -> Path:
    """Run the recipe in `scratch`; the units in parallel, then the link."""
    root = Path(torch.__file__).parent
    include = ["-isystem", str(root / "include")]
    objects = [scratch / f"{unit.name}.o" for unit in what.units]
    calls = [
        [path, *what.flags, *unit.flags, *include, "-c", str(SOURCES / unit.source), "-o", str(into)]
        for unit, into in zip(what.units, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, calls))
    library = scratch / "ms_deform_attn.so"
    link = [f"-L{root / 'lib'}", *(f"-l{name}" for name in what.libraries)]
    _run([path, "-shared", *(str(o) for o in objects), *link, "-o", str(library)])
    return library


def _run(call: list[str]) -> str:
    """Run a compiler; its output. Raises OpError with the last lines of it if it fails."""
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OpError(f"cannot build the operator: {error}") from None
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise OpError(
            f"the operator does not build with {call[0]} (exit {done.returncode}); its last lines:\n{tail}\n"
            "mend the compiler (CXX=... or CUDA_HOME=... picks another), or run with model.op=torch"
        )
    return done.stdout


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.csrc.build",
        description="Build the MSDeformAttn library and print where it is.",
        epilog="example:\n  TORCH_CUDA_ARCH_LIST=9.0 python -m pipeline.csrc.build --device cuda",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=DEVICES, help="default: cpu, and cuda where torch sees a GPU")
    parser.add_argument("--force", action="store_true", help="build even if it is there")
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
