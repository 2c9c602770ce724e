"""What a command loads before it has something to do: `--help` and refusals must not wait for heavy packages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.data import write_shards
from support.paths import ROOT

from pipeline.runs.record import RunRecord, write_run

COMMANDS = sorted(
    f"{path.parent.name}.{path.stem}"
    for folder in ("jobs", "tune")
    for path in (ROOT / folder).glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)
HEAVY = ("torch", "torchvision", "ray", "deepspeed", "mlflow", "pycocotools", "scipy", "matplotlib", "pandas")
CODE = """
import importlib, json, sys
from jobs.cli import main
module = importlib.import_module(sys.argv[1])
try:
    code = main(module.build_parser(), module.run, sys.argv[2:])
except SystemExit as end:
    code = end.code
print()
print(json.dumps([code, sorted(name for name in sys.modules if "." not in name)]))
"""
DEMO = "jobs/configs/demo.yaml"


def loaded(*argv: str) -> tuple[int, set[str]]:
    """Exit code of a command in a process of its own, and the heavy packages it loaded."""
    done = subprocess.run([sys.executable, "-c", CODE, *argv], cwd=ROOT, capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, set(HEAVY) & set(modules)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_heavy_package(command: str) -> None:
    assert loaded(command, "--help") == (0, set())


@pytest.mark.parametrize(
    "argv",
    [
        ("jobs.train", "none.yaml"),
        ("jobs.train", DEMO, "optim.lr=fast"),
        ("jobs.train", DEMO, "tracking.alias=latest"),
        ("jobs.train", DEMO, "data.train=/no/shards"),
        ("jobs.train", DEMO, "data.train=/no/shards", "--dry-run"),
        ("jobs.train", DEMO, "data.train=/no/shards", "--resume"),
        ("jobs.demo", "optim.lr=fast"),
        ("jobs.evaluate", "run", "optim.lr=1"),
        ("jobs.register", "/no/run"),
        ("jobs.promote", "mine", "--metric", "val/mAP"),
        ("jobs.models", "a/b"),
        ("jobs.analyse", "/no/run"),
        ("jobs.analyse", "results.json"),
        ("jobs.settings", "optim.learning_rate"),
        ("tune.sweep", "none.yaml"),
    ],
    ids=" ".join,
)
def test_refusal_of_config_data_and_name_loads_no_heavy_package(argv: tuple[str, ...]) -> None:
    assert loaded(*argv) == (2, set())


def test_settings_are_printed_without_heavy_packages() -> None:
    assert loaded("jobs.settings") == (0, set())


def test_taken_name_is_refused_without_heavy_packages_and_the_plan_without_ray(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    settings = [f"data.train={index.folder}", f"data.val={index.folder}", f"model.num_classes={len(index.categories)}"]
    settings += [f"storage={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]  # not that of a demo here
    code, packages = loaded("jobs.train", DEMO, *settings, "--dry-run")
    assert code == 0
    assert not packages & {"ray", "deepspeed", "mlflow"}
    write_run(RunRecord("demo", f"{tmp_path}/runs/demo", {}, status="FINISHED"))
    assert loaded("jobs.train", DEMO, *settings) == (2, set())


def test_plan_of_a_sweep_loads_no_ray() -> None:
    code, packages = loaded("tune.sweep", "tune/spaces/demo.yaml", "--dry-run")
    assert code == 0
    assert not packages & {"ray", "deepspeed", "mlflow"}
