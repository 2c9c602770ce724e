"""The inputs of a build of the operator: sources, flags, compilers, and the key that identifies a library.

`build.py` runs the recipes. OpError is raised for an unknown device, a broken compiler and an invalid
TORCH_CUDA_ARCH_LIST.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import OpError

SOURCES = Path(__file__).parent
DEVICES = ("cpu", "cuda")
DEFAULT_ARCHS = "7.5;8.0;9.0+PTX"  # does not depend on the node's GPU: a node without one builds the same library
COMPILE_SECONDS = 1200.0  # timeout of one compiler call
_TARGET = "-DTORCH_TARGET_VERSION=0x020A000000000000"  # the stable ABI of torch 2.10: newer ones load it too
_INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}


@dataclass(frozen=True)
class Unit:
    """One compiler call: a source file, the name of its object file, and its own flags."""

    source: str
    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the content of a library, except the compiler."""

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


@dataclass(frozen=True)
class Compiler:
    """A compiler on this machine: its path, its version line, eight hex digits over version and target."""

    path: str
    name: str
    key: str


def make_recipe(device: str) -> Recipe:
    """Make the recipe for `device` on this machine; `$TORCH_CUDA_ARCH_LIST` sets the GPU architectures.

    Raises:
        OpError: the device is unknown, or the list is not valid.
    """
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
    """Yield nvcc's options for a list such as `8.0;9.0+PTX`."""
    for arch in archs.replace(",", ";").replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not arch:
            continue
        if not number.removesuffix("a").isdigit():
            raise OpError(f"TORCH_CUDA_ARCH_LIST holds '{arch}'; write numbers such as '{DEFAULT_ARCHS}'")
        yield f"-gencode=arch=compute_{number},code=sm_{number}"
        if arch.endswith("+PTX"):
            yield f"-gencode=arch=compute_{number},code=compute_{number}"


def find_compiler(device: str) -> Compiler | None:
    """Find the compiler for `device`; `$CXX`, or nvcc of `$CUDA_HOME`, comes first. None if there is no compiler."""
    if device == "cpu":
        names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    else:
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
        names = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    path = next((path for name in names if name and (path := shutil.which(name))), None)
    return _identify(path) if path else None


@functools.cache
def _identify(path: str) -> Compiler:
    text = run_compiler([path, "--version"])
    if not path.endswith("nvcc"):
        text += run_compiler([path, "-dumpmachine"])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    name = next((line for line in lines if "release" in line), lines[0] if lines else path)
    return Compiler(path, name, hashlib.sha256(text.encode()).hexdigest()[:8])


def run_compiler(call: list[str]) -> str:
    """Run a compiler and return its output. Raises OpError with the last lines if it fails."""
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OpError(f"cannot build the operator: {error}") from None
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise OpError(
            f"the operator does not build with {call[0]} (exit {done.returncode}); its last lines:\n{tail}\n"
            "fix the compiler (CXX=... or CUDA_HOME=... selects another), or run with model.op=torch"
        )
    return done.stdout
