"""`python -m benchmarks.machine_code`: registers, shared memory, spills and access widths of the fast CUDA kernels.

It compiles the CUDA source for each architecture and reads the machine code; no GPU is needed. A spill that is executed
once per row of queries is tolerable, one in a loop over points is not: `in loops` counts the latter.
"""

import argparse
import collections
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.cli import CommandParser, Parser, main
from pipeline.csrc.recipe import SOURCES, find_compiler, make_recipe, run_compiler
from pipeline.errors import OpError

ARCHS = ("sm_75", "sm_80", "sm_90", "sm_100")
_KERNEL = re.compile(
    r"(fast_forward|fast_backward|specialised_forward)_kernelI(f|\d+__half|\d+__nv_bfloat16)Li(\d+)E(?:Li(\d+)E)?"
)
_TYPES = {"f": "fp32", "half": "fp16", "nv_bfloat16": "bf16"}
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_ACCESS = re.compile(r"^(?:@!?U?P\d+ )?(LDG|STG|REDG?|ATOMG?)\.\S*")
_BRANCH = re.compile(r"\bBRA\b\S*\s.*?(0x[0-9a-f]+)")


@dataclass(frozen=True)
class MachineCode:
    """One kernel for one architecture."""

    direction: str  # forward, backward
    dtype: str
    channels: int
    form: str  # plain, fused
    variant: str  # shipped, specialised, specialised 512 (threads), sectors
    registers: int
    shared: int  # bytes of a block
    stack: int  # bytes of a thread: spilled registers
    instructions: tuple[tuple[int, str], ...]  # address, text

    @property
    def name(self) -> str:
        """Such as `backward bf16 32 fused sectors`."""
        return f"{self.direction} {self.dtype} {self.channels} {self.form} {self.variant}"

    def count(self, instruction: str) -> int:
        """Instructions that begin with these letters, whatever predicate they have."""
        return sum(bool(re.match(rf"(@!?U?P\d+ )?{re.escape(instruction)}", text)) for _, text in self.instructions)

    def accesses(self) -> dict[str, int]:
        """Global loads, stores and reductions by width, such as `LDG 128`: their number."""
        found: collections.Counter[str] = collections.Counter()
        for _, text in self.instructions:
            if match := _ACCESS.match(text):
                kind = "RED" if match[1].startswith("RED") else match[1]
                found[f"{kind} {_width(match[0])}"] += 1
        return dict(sorted(found.items()))

    def spills(self) -> list[int]:
        """For each access to a spilled register the loops that it is in: 0 before all loops, 1 in that over rows."""
        loops = [
            (int(match[1], 16), address)
            for address, text in self.instructions
            if (match := _BRANCH.search(text)) and int(match[1], 16) < address
        ]
        places = [address for address, text in self.instructions if re.search(r"\b(LDL|STL)\b", text)]
        return [sum(first <= place <= last for first, last in loops) for place in places]


def _width(instruction: str) -> str:
    """Bits of an access per lane."""
    if "F32x4" in instruction:
        return "4x32"
    return next(
        (part.lstrip("US") for part in instruction.split(".") if part.lstrip("US") in ("128", "64", "16")), "32"
    )


def find_disassembler() -> str | None:
    """The toolkit's cuobjdump, or the one of Triton in torch."""
    triton = Path(torch.__file__).parents[1] / "triton/backends/nvidia/bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.fspath(triton))


def read_machine_code(binary: Path, arch: str) -> dict[str, MachineCode]:
    """The fast kernels of a library, a cubin or a fat binary, by name.

    Raises:
        OpError: there is no cuobjdump.
    """
    tool = find_disassembler()
    if tool is None:
        raise OpError("there is no cuobjdump here; it comes with the CUDA toolkit and with Triton")
    used = run_compiler([tool, "-res-usage", "-arch", arch, str(binary)])
    sizes = dict(re.findall(r"Function (\S+):\s+(REG:\d+ STACK:\d+ SHARED:\d+)", used))
    found = {}
    for text in run_compiler([tool, "-sass", "-arch", arch, str(binary)]).split("Function : ")[1:]:
        symbol = text.split(maxsplit=1)[0]
        if kernel := find_kernel(symbol):
            registers, stack, shared = (int(number) for number in re.findall(r"\d+", sizes[symbol]))
            lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", text)
            instructions = tuple((int(address, 16), line) for address, line in lines)
            code = MachineCode(**kernel, registers=registers, shared=shared, stack=stack, instructions=instructions)
            found[code.name] = code
    return found


def find_kernel(symbol: str) -> dict[str, Any] | None:
    """Direction, type, channels, form and variant of a fast kernel; None for another function."""
    match = _KERNEL.search(symbol)
    if match is None:
        return None
    kind, type_name, lanes, threads = match.groups()
    dtype = _TYPES[type_name.lstrip("0123456789_")]
    variant = "sectors" if "Lb1E" in symbol else "shipped"
    if kind.startswith("specialised"):
        variant = "specialised" if threads == "256" else f"specialised {threads}"
    return {
        "direction": kind.rpartition("_")[2],
        "dtype": dtype,
        "channels": int(lanes) * 16 // _BYTES[dtype],
        "form": "plain" if "PlainPoints" in symbol else "fused",
        "variant": variant,
    }


def compile_for(archs: list[str], target: Path, include: Path | None = None, more: Sequence[str] = ()) -> None:
    """Compile the CUDA source with the recipe's flags and `more` into a fat binary.

    Args:
        archs: such as sm_90.
        target: the file.
        include: torch's headers; None: those of the installed torch.
        more: flags.

    Raises:
        OpError: there is no nvcc, or it fails.
    """
    compiler = find_compiler("cuda")
    if compiler is None:
        raise OpError("there is no nvcc here (install the CUDA toolkit; $CUDA_HOME)")
    what = make_recipe("cuda")
    flags = [flag for flag in what.flags if not (more and flag == "-O3")]
    codes = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in archs]
    headers = str(include or Path(torch.__file__).parent / "include")
    source = str(SOURCES / what.units[0].source)
    run_compiler([compiler.path, *flags, *more, "-isystem", headers, "-fatbin", *codes, source, "-o", str(target)])


def row_of(arch: str, code: MachineCode) -> dict[str, Any]:
    """A row of the table."""
    spills = code.spills()
    row = {name: getattr(code, name) for name in ("direction", "dtype", "channels", "form", "variant")}
    row |= {"arch": arch, "registers": code.registers, "shared": code.shared, "stack": code.stack}
    row |= {
        "instructions": len(code.instructions),
        "spills": len(spills),
        "in_loops": sum(depth > 1 for depth in spills),
    }
    return row | {"accesses": code.accesses()}


def print_table(rows: list[dict[str, Any]]) -> None:
    """As Markdown."""
    print("| kernel | arch | registers | shared | stack | spills (in loops) | loads | stores | reductions |")
    print("|---" * 9 + "|")
    for row in rows:
        name = f"{row['direction']} {row['dtype']} {row['channels']} {row['form']} {row['variant']}"
        cells = [
            name,
            row["arch"],
            row["registers"],
            row["shared"],
            row["stack"],
            f"{row['spills']} ({row['in_loops']})",
        ]
        print(f"| {' | '.join(map(str, [*cells, *_widths(row['accesses'])]))} |")


def _widths(accesses: dict[str, int]) -> Iterator[str]:
    for kind in ("LDG", "STG", "RED"):
        widths = [(name.split()[1], number) for name, number in accesses.items() if name.startswith(kind)]
        order = sorted(widths, key=lambda pair: pair[0] != "128")
        yield ", ".join(f"{number} of {width}" for width, number in order)


def build_parser() -> Parser:
    """The command line."""
    name = "benchmarks.machine_code"
    parser = CommandParser(name, __doc__.splitlines()[0], f"python -m {name} --archs sm_90 --channels 32")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), metavar="SM", help="default: sm_75 to sm_100")
    parser.add_argument("--channels", type=int, nargs="+", default=[32], help="of the table; default %(default)s")
    parser.add_argument("--json", type=Path, help="also write the rows of all kernels to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compile, read, print, save."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "operator.fatbin"
        compile_for(args.archs, binary)
        rows = [
            row_of(arch, code) for arch in args.archs for _, code in sorted(read_machine_code(binary, arch).items())
        ]
    print_table([row for row in rows if row["channels"] in args.channels])
    if args.json:
        compiler = find_compiler("cuda")
        setup = {"compiler": compiler and compiler.name, "torch": torch.__version__, "archs": args.archs}
        text = ",\n".join(json.dumps(row) for row in rows)
        args.json.write_text(f'{{"setup": {json.dumps(setup)},\n"rows": [\n{text}\n]}}\n', encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
