"""Preparation of every node that can run workers: build the operator, check the storage, create the shard cache.

It runs once per start: for the driver's node in this process, for each other node in a Ray task on that node. Raises
OpError or RunError with the node's address, before anything of the run is written.
"""

import uuid
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import DataConfig, ScalingConfig
from pipeline.csrc.build import build
from pipeline.data.cache import ShardCache
from pipeline.data.loader import is_cached
from pipeline.errors import PipelineError, RunError
from pipeline.files.storage import exists, is_url, join, remove, write_bytes
from pipeline.logs import get_logger

log = get_logger("nodes")


def prepare_nodes(scaling: ScalingConfig, storage: str, data: DataConfig | None = None) -> None:
    """Run `prepare_node` on every node that can hold a worker.

    Args:
        scaling: with `use_gpu` resolved.
        storage: the folder or URL that all of them must see.
        data: settings of the data that workers read.

    Raises:
        ConfigError, ShardError: `data.cache_dir` cannot be the cache on a node.
        OpError: the operator cannot be built on a node.
        RunError: the storage cannot be written, a node does not see it, or cannot run this code.
    """
    probe = join(storage, f".probe_{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
    except OSError as error:
        raise RunError(f"cannot write into storage {storage}: {error}; fix its permissions or change storage") from None
    try:
        cache = data.cache_dir if data is not None and is_cached(data) else None
        _prepare_all(("cuda" if scaling.use_gpu else "cpu", probe, cache), scaling)
    finally:
        remove(probe)


def _prepare_all(arguments: tuple[str, str, str | None], scaling: ScalingConfig) -> None:
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and holds_a_worker(node["Resources"], scaling)]
    others = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["NodeID"] != here}
    task = ray.remote(num_cpus=0, max_retries=0)(prepare_node)
    running = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote(*arguments): name
        for name in others
    }
    if len(others) < len(nodes):
        prepare_node(*arguments)
    for reference, name in running.items():
        try:
            ray.get(reference)
        except (NodeDiedError, TaskUnschedulableError):  # Ray lists a killed node as alive for a while
            log.warning("node %s is gone, the run starts without it", others[name])
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, PipelineError):
                raise type(cause)(f"node {others[name]}: {cause}") from None
            raise RunError(  # a missing package, or the node is gone
                f"node {others[name]} cannot be prepared: {cause or error}; install the packages of constraints.txt "
                "and this code on it, or remove it from the cluster"
            ) from error


def prepare_node(device: str, probe: str, cache_dir: str | None = None) -> None:
    """Prepare the node of this process for its workers.

    Args:
        device: `cpu` or `cuda`.
        probe: a file that the driver has written into the storage.
        cache_dir: `data.cache_dir` if shards are cached.

    Raises:
        ConfigError, ShardError: the cache's folder holds something else, or cannot be created.
        OpError: the operator cannot be built here.
        RunError: the file does not exist here.
    """
    if not exists(probe):
        storage = probe.rpartition("/")[0]
        shared = "a folder that all nodes share, or a URL"
        advice = "on this node the URL leads to another store" if is_url(storage) else f"set storage to {shared}"
        raise RunError(f"storage {storage} is not the one that the driver writes: {advice}")
    if cache_dir is not None:
        ShardCache(cache_dir, 0).make_folder()
    build(device)


def holds_a_worker(resources: Mapping[str, Any], scaling: ScalingConfig) -> bool:
    """Whether a node is large enough for one worker."""
    return resources.get("CPU", 0) >= scaling.cpus_per_worker and (not scaling.use_gpu or resources.get("GPU", 0) >= 1)
