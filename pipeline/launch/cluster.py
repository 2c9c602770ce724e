"""The Ray cluster of a run: connect to one or start one, choose resources, refuse a run that can never be scheduled.

All of it happens before a worker starts. Raises ResourceError with the numbers.
"""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from pipeline.config import EvaluationConfig, ScalingConfig
from pipeline.errors import ResourceError
from pipeline.logs import get_logger
from pipeline.signals import handle_sigterm_in_python

log = get_logger("cluster")
POLL_SECONDS = 5.0
PROBE_SECONDS = 5.0  # for Ray to answer at RAY_ADDRESS
TRAIN_SETTINGS = {
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",  # limits the wait for a rank that is lost
    # Timeout for Ray to find resources for the worker group (not for the workers to start). After a node is lost, an
    # elastic run asks for its old size for this long before it accepts fewer workers. `driver.failure_limits` sets the
    # number of attempts.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with the patch, Ray prints standard output that a library has redirected
}


def start_ray() -> None:
    """Connect to RAY_ADDRESS (set inside a Ray job) or start Ray on this machine. Reuses a running connection.

    Raises:
        ResourceError: nothing answers at RAY_ADDRESS, or Ray cannot start in its temporary folder.
    """
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        check_address(address)
        _init(f"RAY_ADDRESS={address}", address=address)
        return
    # Ray's cleaner of placement groups asks the dashboard whether a run was stopped. It searches for a Ray on this
    # machine and gives up if it finds two, so it gets the address.
    port = _free_port()
    environment = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
    _init(
        f"the temporary folder {ray_folder()}",
        address="local",
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=port,
        runtime_env={"env_vars": environment},
    )


def check_address(address: str) -> None:
    """Refuse an address where no Ray answers. Ray itself would retry for two minutes and then end the process.

    Args:
        address: as in RAY_ADDRESS: `HOST:PORT`, `ray://HOST:PORT`, or a word such as `auto`.

    Raises:
        ResourceError: with the address.
    """
    if address.startswith(("http://", "https://")):
        raise ResourceError(f"RAY_ADDRESS={address} is for `ray job submit`; use that, or unset RAY_ADDRESS")
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return
    # Ray replaces a loopback address by the address of the node.
    hosts = [host, ray.util.get_node_ip_address()] if host in ("127.0.0.1", "localhost") else [host]
    if not any(_answers(each, int(port)) for each in hosts):
        raise ResourceError(f"no Ray answers at RAY_ADDRESS={address}; start it, correct the address or unset it")


def ray_folder() -> str:
    """Ray's temporary folder for sockets and logs, preceded by the variable that sets it."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    return f"{name}={os.environ[name]}" if name else "/tmp"


def _init(where: str, **options: Any) -> None:
    try:
        ray.init(logging_level="WARNING", **options)
    except Exception as error:  # on an overloaded machine Ray raises a bare Exception
        line = str(error).strip().partition("\n")[0]
        advice = "; give a shorter RAY_TMPDIR" if "AF_UNIX" in line else ""
        raise ResourceError(f"Ray does not start with {where}: {line}{advice}") from error
    handle_sigterm_in_python()


def _answers(host: str, port: int) -> bool:
    """Whether a gRPC server answers, as Ray's does."""
    import grpc  # only a cluster needs it

    try:
        socket.create_connection((host, port), PROBE_SECONDS).close()
    except OSError:
        return False
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return True
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(PROBE_SECONDS)
        except grpc.FutureTimeoutError:
            return False
    return True


def resolve_gpu(scaling: ScalingConfig) -> ScalingConfig:
    """Resolve `use_gpu: auto`: GPUs are used if there is one for each of the required workers."""
    if scaling.use_gpu != "auto":
        return scaling
    enough = ray.cluster_resources().get("GPU", 0) >= scaling.min_required
    return scaling.model_copy(update={"use_gpu": enough})


def resolve_where(evaluation: EvaluationConfig, scaling: ScalingConfig) -> EvaluationConfig:
    """Resolve `where: auto` to `tasks` or `inline` by the free resources; logs which, and warns if tasks must wait.

    Args:
        evaluation: the section of the run.
        scaling: with `use_gpu` resolved.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    spare = has_spare_slot(scaling, nodes, ray.available_resources())
    slot = f"{scaling.cpus_per_worker:g} CPUs" + " and a GPU" * (scaling.use_gpu is True)
    if evaluation.where == "tasks" and not spare:
        log.warning(
            "evaluation.where=tasks, but %d workers leave no slot of %s: evaluations wait until training ends",
            scaling.num_workers,
            slot,
        )
    if evaluation.where != "auto":
        return evaluation
    if spare:
        log.info("evaluation runs beside the training, in a slot of %s; evaluation.where=inline stops this", slot)
    else:
        log.info("evaluation runs between two steps: %d workers leave no slot of %s", scaling.num_workers, slot)
    return evaluation.model_copy(update={"where": "tasks" if spare else "inline"})


def has_spare_slot(scaling: ScalingConfig, nodes: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> bool:
    """Whether one more process of a worker's size fits beside all workers.

    Args:
        scaling: the resources that the run requests.
        nodes: each node's resources, used or not.
        free: unused resources of all nodes together.
    """
    wanted = scaling.num_workers + 1
    enough = free.get("CPU", 0) >= wanted * scaling.cpus_per_worker
    if scaling.use_gpu is True:
        enough = enough and free.get("GPU", 0) >= wanted
    return enough and count_slots(scaling, nodes) >= wanted


def check_resources(scaling: ScalingConfig) -> None:
    """Compare the resources that the run requests with those of the cluster, which may grow for `wait_minutes`.

    Raises:
        ResourceError: with both numbers.
    """
    deadline = time.monotonic() + 60 * scaling.wait_minutes
    while shortage := _shortage(scaling):
        if time.monotonic() >= deadline:
            raise ResourceError(shortage)
        if scaling.wait_minutes:
            log.info("waiting for the cluster: %s", shortage)
            _ask_autoscaler(scaling)
        time.sleep(POLL_SECONDS)


def _shortage(scaling: ScalingConfig) -> str:
    """The missing resources as a message, or an empty string."""
    have, workers = ray.cluster_resources(), scaling.min_required
    key = "scaling.num_workers" if scaling.min_workers is None else "scaling.min_workers"
    if scaling.use_gpu is True and have.get("GPU", 0) < workers:
        return (
            f"{key}={workers} needs {workers} GPUs, the cluster has {have.get('GPU', 0):g}; "
            "lower it, set scaling.use_gpu=false, or scaling.wait_minutes if the cluster can grow"
        )
    if have.get("CPU", 0) < workers * scaling.cpus_per_worker:
        return (
            f"{key}={workers} x scaling.cpus_per_worker={scaling.cpus_per_worker:g} needs "
            f"{workers * scaling.cpus_per_worker:g} CPUs, the cluster has {have.get('CPU', 0):g}; lower one of them, "
            "or set scaling.wait_minutes if the cluster can grow"
        )
    return _unplaceable(scaling, [node["Resources"] for node in ray.nodes() if node["Alive"]], key)


def _unplaceable(scaling: ScalingConfig, nodes: Sequence[Mapping[str, float]], key: str) -> str:
    """A message if the sums suffice but not every worker fits on one node; empty if all fit."""
    slots = count_slots(scaling, nodes)
    if slots >= scaling.min_required:
        return ""
    worker = f"{scaling.cpus_per_worker:g} CPUs" + " and a GPU" * (scaling.use_gpu is True)
    return (
        f"{key}={scaling.min_required} of {worker} each, the {len(nodes)} nodes hold {slots}: a worker cannot be split "
        "over nodes; lower it or scaling.cpus_per_worker, or set scaling.wait_minutes if the cluster can grow"
    )


def count_slots(scaling: ScalingConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """The number of workers that the nodes can run at a time, given the resources of each node.

    Args:
        scaling: the resources of one worker.
        nodes: resources by name, e.g. `{"CPU": 8.0, "GPU": 1.0}`.
    """
    slots = 0
    for node in nodes:
        by_cpu = int(node.get("CPU", 0) / scaling.cpus_per_worker)
        slots += min(by_cpu, int(node.get("GPU", 0))) if scaling.use_gpu is True else by_cpu
    return slots


def _ask_autoscaler(scaling: ScalingConfig) -> None:
    from ray.autoscaler.sdk import request_resources  # only a growing cluster needs it

    bundle = {"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu is True else {})}
    request_resources(bundles=[bundle] * scaling.num_workers)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
