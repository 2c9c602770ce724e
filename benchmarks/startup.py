"""`python -m benchmarks.startup`: how long commands take to print their help or to refuse a wrong request.

Each command runs in its own process, `--rounds` times in turns; the table has the least wall clock and processor time
of each. Goals on two quiet cores: 0.7 s for `--help`, 3 s for a refusal of config, data or names. `--imports N` also
lists the N slowest imports of each command by `python -X importtime`, without the time of their own imports.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

from jobs.cli import CommandParser, Parser, main
from pipeline.errors import PipelineError

ROOT = Path(__file__).parents[1]
PRESET = "jobs/configs/r50_deformable.yaml"
COMMANDS = (
    "train", "demo", "doctor", "evaluate", "export", "lint", "predict", "register", "settings", "shard", "table",
    "weights",
)  # fmt: skip
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    **{f"jobs.{name} --help": ((f"jobs.{name}", "--help"), 0) for name in COMMANDS},
    "tune.sweep --help": (("tune.sweep", "--help"), 0),
    "all settings": (("jobs.settings",), 0),
    "wrong setting": (("jobs.train", PRESET, "optim.lr=fast"), 2),
    "wrong alias": (("jobs.train", PRESET, "tracking.alias=latest"), 2),
    "no such shards": (("jobs.train", PRESET, "data.train=/no/shards", "data.val=/no/shards"), 2),
    "no such run": (("jobs.register", "/no/run"), 2),
    "wrong space": (("tune.sweep", "tune/spaces/demo.yaml", "optim.lrr=1"), 2),
    "plan of a sweep": (("tune.sweep", "tune/spaces/demo.yaml", "--dry-run"), 0),
}


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.startup", __doc__, "python -m benchmarks.startup --rounds 5 --imports 5")
    parser.add_argument("--rounds", type=int, default=3, help="processes per command (default: %(default)s)")
    parser.add_argument("--imports", type=int, default=0, metavar="N", help="also list the N slowest imports of each")
    return parser


def measure(arguments: tuple[str, ...], expected: int) -> tuple[float, float]:
    """Wall clock and processor seconds of one process. Raises PipelineError for another exit code than expected."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        raise PipelineError(f"{' '.join(arguments)} exits with {done.returncode}, not {expected}: {done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def slowest_imports(arguments: tuple[str, ...], number: int) -> list[tuple[str, float]]:
    """Modules and their own import times in seconds, slowest first."""
    command = [sys.executable, "-X", "importtime", "-m", *arguments]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stderr
    lines = [line.removeprefix("import time:").split("|") for line in report.splitlines() if line.count("|") == 2]
    times = [(name.strip(), int(own) / 1e6) for own, _, name in lines if own.strip().isdigit()]
    return sorted(times, key=lambda item: -item[1])[:number]


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for _ in range(args.rounds):
        for name, (arguments, expected) in CASES.items():
            found[name].append(measure(arguments, expected))
    print(f"{'command':<22} wall s  CPU s")
    for name, pairs in found.items():
        print(f"{name:<22} {min(wall for wall, _ in pairs):6.2f} {min(cpu for _, cpu in pairs):6.2f}")
        for module, seconds in slowest_imports(CASES[name][0], args.imports) if args.imports else ():
            print(f"  {module:<40} {seconds:6.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
