"""`python -m benchmarks.compile_matrix`: the CUDA source against the oldest allowed torch and the installed one.

Each row is one torch and one architecture, compiled without optimisation; no GPU is needed. The headers of the oldest
torch come out of the smallest wheel of that version, one for another platform (80 MB).
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path

import torch

from benchmarks.machine_code import compile_for
from jobs.cli import CommandParser, Parser, main
from pipeline.errors import OpError

ROOT = Path(__file__).parents[1]
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
WITHOUT_OPTIMISATION = ("-O0", "-Xcicc", "-O0")
DOWNLOAD_SECONDS = 300


def oldest_torch() -> str:
    """The lower bound of the requirement, such as `2.11.0`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = (found[1] for text in project["dependencies"] if (found := re.match(r"torch>=([\d.]+)", text)))
    return bound + ".0" * (2 - bound.count("."))


def download_headers(version: str, folder: Path) -> Path:
    """The include folder of a torch version, in `folder`.

    Raises:
        OpError: pip finds no wheel, or takes too long.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--platform", "macosx_11_0_arm64", "--python-version", "3.11", f"torch=={version}", "-d", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise OpError(f"torch {version} was not downloaded within {DOWNLOAD_SECONDS} s; try again") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise OpError(f"no wheel of torch {version} to be had here: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("torch/include/")])
    wheels[0].unlink()
    return folder / "torch" / "include"


def build_parser() -> Parser:
    """The command line."""
    name = "benchmarks.compile_matrix"
    parser = CommandParser(name, __doc__.splitlines()[0], f"python -m {name} --archs sm_80 sm_90")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), metavar="SM", help="default: sm_75 to sm_100")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compile and print; 1 if something does not compile."""
    faults = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        headers = {
            oldest_torch(): download_headers(oldest_torch(), folder),
            torch.__version__: Path(torch.__file__).parent / "include",
        }
        print("| torch | " + " | ".join(args.archs) + " |")
        print("|---" * (len(args.archs) + 1) + "|")
        for version, include in headers.items():
            cells = []
            for arch in args.archs:
                start = time.monotonic()
                try:
                    compile_for([arch], folder / "operator.fatbin", include, WITHOUT_OPTIMISATION)
                    cells.append(f"ok, {time.monotonic() - start:.0f} s")
                except OpError as error:
                    faults.append(f"torch {version}, {arch}: {error}")
                    cells.append("fails")
            print(f"| {version} | {' | '.join(cells)} |", flush=True)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
