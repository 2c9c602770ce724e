"""cluster.yaml: Ray's own schema accepts it, and what the schema does not see is checked here.

The schema knows no provider settings, no shell and no files, so each command goes through `bash -n`, the paths are
looked up, and the pins are compared. Every check is shown to catch a file that breaks it.
"""

import copy
import re
import subprocess
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import yaml
from support.paths import ROOT
from support.ray_internals import prepare_config, validate_config

COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
Cluster = dict[str, Any]


@pytest.fixture
def cluster() -> Cluster:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def validate(cluster: Cluster) -> Cluster:
    """What `ray up` does before it talks to the provider; works on a copy."""
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def faults(cluster: Cluster) -> list[str]:
    """What Ray's schema cannot see."""
    found: list[str] = []
    commands = [command for group in COMMANDS for command in cluster.get(group, [])]
    for command in commands:
        if subprocess.run(["bash", "-n", "-c", command], capture_output=True, check=False).returncode:
            found.append(f"not shell: {command}")
    tree = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    found += [f"no such file: {path}" for path in tree if not (ROOT / path).exists()]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for name, version in re.findall(r"\b([a-z]+)==([\w.]+)", " ".join(commands)):
        if pins.get(name) != version:
            found.append(f"{name}=={version} is not constraints.txt's {pins.get(name)}")
    installs = [command for command in cluster["setup_commands"] if "pip install" in command]
    found += [f"without pins: {command}" for command in installs if "-c constraints.txt" not in command]
    if not any(re.search(r"pip install .* \.$", command) for command in installs):
        found.append("the project is not installed")
    devices = {device for command in cluster["setup_commands"] for device in re.findall(r"--device (\w+)", command)}
    if devices != {"cpu", "cuda"}:
        found.append("the operator is not built ahead for cpu and cuda")
    torch_cuda = pins["cuda-toolkit"].rsplit(".", 2)[0]
    if not re.search(rf":{torch_cuda}\.\d+-.*devel", cluster["docker"]["image"]):
        found.append(f"the image has no compiler of torch's CUDA {torch_cuda}")
    for group in ("head_start_ray_commands", "worker_start_ray_commands"):
        if " MLFLOW_TRACKING_URI=http" not in cluster[group][-1]:
            found.append(f"{group}: no tracking URI")
        if "export RAY_AUTH_MODE=token" not in cluster[group][-1]:
            found.append(f"{group}: anyone who reaches the port may run code")
        if "ulimit -n" not in cluster[group][-1]:
            found.append(f"{group}: no limit of open files")
    if "0.0.0.0" in " ".join(commands):
        found.append("MLflow listens beyond the cluster")
    if "--autoscaling-config=~/ray_bootstrap_config.yaml" not in cluster["head_start_ray_commands"][-1]:
        found.append("the head does not know the autoscaler's file")
    if not all(
        "/mnt/shared" in text for text in (cluster["docker"]["run_options"][-1], *cluster["initialization_commands"])
    ):
        found.append("the shared folder is not mounted into the container")
    for name, node in cluster["available_node_types"].items():
        if not re.fullmatch(r"[a-z]+\d+[a-z-]*\.(\d*x?large|metal)", node["node_config"].get("InstanceType", "")):
            found.append(f"{name}: no EC2 instance type")
        if node.get("min_workers", 0) > node.get("max_workers", 0):
            found.append(f"{name}: min_workers above max_workers")
        if not re.fullmatch(r"ami-[0-9a-f]{17}", node["node_config"].get("ImageId", "")):
            found.append(f"{name}: no machine image")
    if "~/.ray/auth_token" not in cluster["file_mounts"]:
        found.append("the nodes do not get the token")
    gpu = [node for node in cluster["available_node_types"].values() if node["resources"].get("GPU")]
    if not gpu or cluster["available_node_types"][cluster["head_node_type"]]["resources"] != {"CPU": 0, "GPU": 0}:
        found.append("GPU nodes are missing, or the head would be given training workers")
    return found


def test_is_valid(cluster: Cluster) -> None:
    prepared = validate(cluster)
    assert faults(cluster) == []
    assert prepared["available_node_types"]["gpu"]["max_workers"] == 4
    assert prepared["head_setup_commands"][: len(cluster["setup_commands"])] == cluster["setup_commands"]


def test_header_names_every_place_to_fill_in() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    places = [line for line in text.splitlines() if "00000000" in line or "region:" in line]
    assert len(places) == 4
    assert text.count("FILL IN") == 5  # the header and each place


@pytest.mark.parametrize(
    "break_it",
    [
        lambda c: c.update(worker_max=3),
        lambda c: c.pop("provider"),
        lambda c: c["available_node_types"]["gpu"].update(gpus=4),
        lambda c: c["available_node_types"]["gpu"]["resources"].update(GPU="four"),
        lambda c: c["available_node_types"]["gpu"].pop("node_config"),
        lambda c: c.update(head_node_type="boss"),
        lambda c: c.update(max_workers=0),
        lambda c: c["setup_commands"].append(["ls"]),
        lambda c: c["docker"].update(gpus="all"),
        lambda c: c["auth"].update(user="me"),
    ],
)
def test_ray_refuses_a_broken_file(cluster: Cluster, break_it: Callable[[Cluster], Any]) -> None:
    break_it(cluster)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        validate(cluster)


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda c: c["setup_commands"].append("if true; then"), "not shell"),
        (lambda c: c["initialization_commands"].append("(echo"), "not shell"),
        (lambda c: c["file_mounts"].update({"~/x": "./nowhere"}), "no such file"),
        (lambda c: c["setup_commands"].append("pip install -c constraints.txt ray==1.0"), "ray==1.0"),
        (lambda c: c["setup_commands"].append("pip install ray"), "without pins"),
        (lambda c: c["setup_commands"].__delitem__(4), "not installed"),
        (lambda c: c["setup_commands"].pop(), "not built ahead"),
        (lambda c: c["docker"].update(image="nvidia/cuda:12.4.1-devel-ubuntu22.04"), "torch's CUDA 13.0"),
        (lambda c: c["docker"].update(image="nvidia/cuda:13.0.2-runtime-ubuntu24.04"), "torch's CUDA 13.0"),
        (lambda c: c["docker"].update(run_options=[""]), "not mounted"),
        (lambda c: c["worker_start_ray_commands"].append("ray start"), "no tracking URI"),
        (lambda c: c["head_start_ray_commands"].insert(1, "mlflow server --host 0.0.0.0"), "listens beyond"),
        (lambda c: c["worker_start_ray_commands"].append("ray start"), "may run code"),
        (lambda c: c["file_mounts"].pop("~/.ray/auth_token"), "do not get the token"),
        (lambda c: c["available_node_types"]["gpu"]["node_config"].update(InstanceType="g5.12xlrage"), "instance type"),
        (lambda c: c["available_node_types"]["gpu"].update(min_workers=5), "min_workers above"),
        (lambda c: c["available_node_types"]["head"]["node_config"].pop("ImageId"), "no machine image"),
        (lambda c: c["available_node_types"]["head"].update(resources={"CPU": 8}), "head would be given"),
    ],
)
def test_our_checks_refuse_a_broken_file(cluster: Cluster, break_it: Callable[[Cluster], Any], text: str) -> None:
    break_it(cluster)
    assert any(text in fault for fault in faults(cluster))
