"""What the repository's host reads: workflows, forms, the citation, and the versions of the pre-commit hooks.

Every check of the workflows is shown to catch one that breaks it.
"""

import copy
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from support.paths import ROOT

import pipeline

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
MAKEFILE = (ROOT / "Makefile").read_text()
Workflow = dict[str, Any]


def pythons() -> list[str]:
    """The versions that pyproject.toml claims."""
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text) for text in PROJECT["classifiers"])
    return [match[1] for match in found if match]


def oldest_torch() -> str:
    (bound,) = (match[1] for text in PROJECT["dependencies"] if (match := re.match(r"torch>=([\d.]+)", text)))
    return bound


def commands(workflow: Workflow) -> Iterator[tuple[dict[str, Any], str]]:
    """Every job with each of its shell commands."""
    for job in workflow["jobs"].values():
        yield from ((job, step["run"]) for step in job["steps"] if "run" in step)


def faults(workflow: Workflow) -> list[str]:
    """What keeps a workflow from running, as far as it shows without its host."""
    found: list[str] = []
    for job, command in commands(workflow):
        shell = re.sub(r"\$\{\{.*?\}\}", "value", command)
        if subprocess.run(["bash", "-n", "-c", shell], capture_output=True, check=False).returncode:
            found.append(f"not shell: {command}")
        for target in re.findall(r"\bmake ([a-z-]+)", command):
            if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE):
                found.append(f"no target: make {target}")
        for module in re.findall(r"-m ((?:pipeline|jobs|tune)[\w.]*)", command):
            if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
                found.append(f"no module: {module}")
        for name in re.findall(r"matrix\.(\w+)", command):
            if name not in job.get("strategy", {}).get("matrix", {}):
                found.append(f"no matrix: {name}")
    for name, job in workflow["jobs"].items():
        found += [f"{name}: no time limit"] * ("timeout-minutes" not in job)
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        found += [f"{name}: {text} has no version" for text in uses if not re.fullmatch(r"[\w/-]+@v\d+", text)]
        for step in job["steps"]:
            version = step.get("with", {}).get("python-version", pythons()[0])
            versions = job["strategy"]["matrix"].get("python", []) if "matrix" in version else [version]
            found += [f"{name}: Python {each} is not claimed" for each in versions if each not in pythons()]
    if workflow.get("permissions") != {"contents": "read"}:
        found.append("more permissions than reading")
    return found


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_can_run(name: str) -> None:
    assert faults(WORKFLOWS[name]) == []


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda w: w["jobs"]["test"]["steps"].append({"run": "make tset"}), "no target: make tset"),
        (lambda w: w["jobs"]["test"]["steps"].append({"run": "if true; then"}), "not shell"),
        (lambda w: w["jobs"]["test"]["steps"].append({"run": "python -m jobs.nothing"}), "no module: jobs.nothing"),
        (lambda w: w["jobs"]["test"]["strategy"]["matrix"].pop("python"), "no matrix: python"),
        (lambda w: w["jobs"]["test"]["strategy"]["matrix"]["python"].append("3.14"), "Python 3.14"),
        (lambda w: w["jobs"]["lint"]["steps"][1]["with"].update({"python-version": "3.10"}), "Python 3.10"),
        (lambda w: w["jobs"]["lint"]["steps"].append({"uses": "actions/checkout@main"}), "has no version"),
        (lambda w: w["jobs"]["lint"].pop("timeout-minutes"), "no time limit"),
        (lambda w: w.pop("permissions"), "more permissions"),
    ],
)
def test_broken_workflow_is_found(break_it: Callable[[Workflow], Any], text: str) -> None:
    workflow = copy.deepcopy(WORKFLOWS["checks"])
    break_it(workflow)
    assert any(text in fault for fault in faults(workflow))


def test_suite_runs_on_every_python_that_is_claimed() -> None:
    lower, upper = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()  # type: ignore[union-attr]
    assert pythons() == [f"3.{minor}" for minor in range(int(lower), int(upper))]
    assert WORKFLOWS["checks"]["jobs"]["test"]["strategy"]["matrix"]["python"] == pythons()


def test_kernels_are_compiled_against_the_oldest_and_the_newest_torch() -> None:
    job = WORKFLOWS["checks"]["jobs"]["cuda"]
    assert job["strategy"]["matrix"]["torch"] == [f"torch=={oldest_torch()}.*", "torch"]
    assert job["container"] == yaml.safe_load((ROOT / "cluster.yaml").read_text())["docker"]["image"]
    assert any("--device cuda" in step.get("run", "") for step in job["steps"])


def test_newest_releases_are_tried_every_week() -> None:
    workflow = WORKFLOWS["newest"]
    (when,) = workflow[True]["schedule"]  # YAML 1.1 reads `on` as true
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", when["cron"])
    packages = workflow["jobs"]["test"]["strategy"]["matrix"]["package"]
    assert [text.partition("[")[0] for text in packages] == ["ray", "deepspeed", "mlflow"]
    assert packages[0] in [re.split("[<>=]", text)[0] for text in PROJECT["dependencies"]]  # with its extras


def test_hooks_are_what_make_lint_runs_in_the_same_versions() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: repo for repo in repos for hook in repo["hooks"]}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert lint
    tools = [line.replace("$(BIN)/", "").split() for line in lint[1].splitlines()]
    names = ["-".join(words[: 2 if words[0] == "ruff" else 1]) for words in tools]
    assert sorted(hooks) == sorted(names)
    for name, repo in hooks.items():
        if repo["repo"] == "local":  # the environment's own, and so constraints.txt's
            (hook,) = repo["hooks"]
            assert hook["entry"] == f".venv/bin/{name}"
        else:
            assert repo["rev"] == f"v{PINS[name.partition('-')[0]]}"


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == pipeline.__version__
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_forms_ask_for_something_and_name_existing_commands() -> None:
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text())
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids)
        assert any(field.get("validations", {}).get("required") for field in form["body"])
        for command in re.findall(r"`ddetr ([a-z]\w*)", path.read_text()):
            assert (ROOT / "jobs" / f"{command}.py").is_file()
