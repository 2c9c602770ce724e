"""`python -m jobs.doctor`: what the operator needs, what is built, what `auto` selects and why, and how to fix it.

Builds and starts nothing; exits 1 if a device of this machine has no kernels.
"""

import argparse
import sys

from jobs.cli import CommandParser, Parser, main


def build_parser() -> Parser:
    """The command line."""
    return CommandParser("jobs.doctor", "Check the MSDeformAttn operator on this machine.", "python -m jobs.doctor")


def describe_operator(device: str, present: bool) -> tuple[list[str], bool]:
    """Describe the operator for `device`; the second value is whether tensors there use its kernels."""
    import torch

    from pipeline.csrc import build
    from pipeline.csrc.recipe import find_compiler
    from pipeline.model.ops import sampling

    compiler, library = find_compiler(device), build.find(device)
    lines = [f"compiler   {compiler.name if compiler else 'none'}"]
    if library:
        facts = build.facts(library)
        lines.append(f"library    {library}")
        lines.append(f"built      with {facts['compiler']}, torch {facts['torch']}, in {facts['seconds']} s")
        archs = [flag.rpartition("=")[2] for flag in facts["flags"] if flag.startswith(("-gencode", "-DMSDA_ISA"))]
        lines.append(f"for        {', '.join(archs)}")
    if not present:
        return [*lines, "auto       torch sees no such device here, so nothing is selected"], True
    command = f"python -m pipeline.csrc.build --device {device}"
    if library:
        selected = sampling.choose("auto", device)
        loads = selected == device
        reason = "because the library above loads" if loads else f"because it does not load: {command} --force"
        if selected == "cpu":
            reason += f"; on this processor it runs {build.instruction_set()}"
        return [*lines, f"auto       {selected}, {reason}"], selected == device
    if compiler:
        return [*lines, f"auto       {device}, which the first call builds; to build it now: {command}"], True
    tool = "a C++ compiler" if device == "cpu" else f"the CUDA {torch.version.cuda} toolkit (nvcc, or CUDA_HOME)"
    lines.append("auto       torch (grid_sample, many times slower), because nothing is built and no compiler is here")
    return [*lines, f"fix        install {tool}, then {command}"], False


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 0 if every device has its kernels."""
    import torch  # here and above, so that --help needs no torch

    from pipeline.csrc import build, kernels

    asked = kernels.requested_kernels()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"torch      {torch.__version__} (CUDA {torch.version.cuda}), python {sys.version.split()[0]}")
    print(f"GPUs       {', '.join(gpus) or 'none visible'}")
    print(f"kernels    {(asked.name or '').replace('|', ',').lower()} ({kernels.VARIABLE}, on GPUs)")
    print(f"cache      {build.cache_folder()} (DEFORMABLE_OP_CACHE)")
    healthy = True
    for device, present in (("cpu", True), ("cuda", bool(gpus))):
        lines, works = describe_operator(device, present)
        healthy = healthy and works
        print("\n".join([device, *(f"  {line}" for line in lines)]))
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
