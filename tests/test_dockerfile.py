"""The Dockerfile: a linter accepts it, and its steps fit the project. Building it needs Docker and tens of gigabytes.

Every check is shown to catch a file that breaks it.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
SENT = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]


def instructions(text: str) -> list[tuple[str, str]]:
    """`[("FROM", "nvidia/cuda:..."), ...]` without comments and continued lines."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]  # type: ignore[misc]


def faults(text: str) -> list[str]:
    """What a linter cannot see."""
    found: list[str] = []
    steps = instructions(text)
    every = {key: [rest for name, rest in steps if name == key] for key in ("FROM", "COPY", "RUN", "USER")}
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    if every["FROM"] != [cluster["docker"]["image"]]:
        found.append(f"the image is not the cluster's {cluster['docker']['image']}")
    copied = [path for rest in every["COPY"] for path in rest.split()[:-1]]
    found += [f"no such file: {path}" for path in copied if not (ROOT / path).exists()]
    found += [f".dockerignore keeps {path} back" for path in copied if path not in SENT]
    found += [f"{path} is sent and not copied" for path in SENT if path not in copied]
    for command in every["RUN"]:
        if subprocess.run(["bash", "-n", "-c", command], capture_output=True, check=False).returncode:
            found.append(f"not shell: {command}")
        if "pip install" in command and "-c constraints.txt" not in command:
            found.append(f"without pins: {command}")
    first = next((place for place, (_, rest) in enumerate(steps) if "-c constraints.txt" in rest), len(steps))
    if ("COPY", "constraints.txt ./") not in steps[:first]:
        found.append("constraints.txt is copied too late")
    if not any(re.search(r"pip install .*--no-build-isolation '?\.(\[|$)", command) for command in every["RUN"]):
        found.append("the project is not installed")
    if set(re.findall(r"pipeline\.csrc\.build --device (\w+)", " ".join(every["RUN"]))) != {"cpu", "cuda"}:
        found.append("the operator is not built for cpu and cuda")
    if not every["USER"] or every["USER"][-1] in ("root", "0"):
        found.append("commands run as root")
    return found


def test_steps_fit_the_project() -> None:
    assert faults(DOCKERFILE) == []


def test_linter_accepts_it() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("no hadolint: `make install` brings it")
    done = subprocess.run([linter, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("nvidia/cuda:13.0.2", "nvidia/cuda:12.4.1", "not the cluster's"),
        ("COPY tune tune", "COPY tunes tunes", "no such file: tunes"),
        ("COPY tune tune", "COPY tests tests", "keeps tests back"),
        ("COPY tune tune\n", "", "tune is sent and not copied"),
        ("&& rm -rf", "&& if rm -rf", "not shell"),
        ("--no-cache-dir -c constraints.txt setuptools", "--no-cache-dir setuptools", "without pins"),
        ("COPY constraints.txt ./\n", "", "too late"),
        ("'.[export,s3]'", "ray", "not installed"),
        ("--device cuda", "--device cpu", "not built for"),
        ("USER 1001", "USER root", "as root"),
    ],
)
def test_broken_steps_are_found(old: str, new: str, text: str) -> None:
    assert old in DOCKERFILE
    assert any(text in fault for fault in faults(DOCKERFILE.replace(old, new)))
