"""Every node that may run workers, made ready before they start: operator built, storage seen, cache of shards made.

Once per start. The driver's own node is done in this process, each other one by a Ray task that is bound to it. Raises
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
        data: what workers will read.

    Raises:
        ConfigError, ShardError: `data.cache_dir` cannot be the cache on a node.
        OpError: the operator cannot be built on a node.
        RunError: the storage cannot be written, a node does not see it, or cannot run this code.
    """
    probe = join(storage, f".probe_{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
    except OSError as error:
        raise RunError(f"cannot write into storage {storage}: {error}; mend access or change `storage`") from None
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
        except (NodeDiedError, TaskUnschedulableError):  # Ray counts a node that was killed as alive for a while
            log.warning("node %s has just gone: the run starts without it", others[name])
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, PipelineError):
                raise type(cause)(f"node {others[name]}: {cause}") from None
            raise RunError(  # a package that it lacks, or it is gone
                f"node {others[name]} cannot be made ready: {cause or error}; give it the packages of constraints.txt "
                "and this code, or take it out of the cluster"
            ) from error


def prepare_node(device: str, probe: str, cache_dir: str | None = None) -> None:
    """What a node needs before its workers start.

    Args:
        device: `cpu` or `cuda`.
        probe: a file that the driver has put into the storage.
        cache_dir: `data.cache_dir` if shards are cached.

    Raises:
        ConfigError, ShardError: the cache's folder holds something else, or cannot be made.
        OpError: the operator cannot be built here.
        RunError: the file is not seen from here.
    """
    if not exists(probe):
        storage = probe.rpartition("/")[0]
        mend = "the URL means another store here" if is_url(storage) else "give a folder that all nodes share, or a URL"
        raise RunError(f"storage {storage} is not the one that the driver writes: {mend}")
    if cache_dir is not None:
        ShardCache(cache_dir, 0).make_folder()
    build(device)


def holds_a_worker(resources: Mapping[str, Any], scaling: ScalingConfig) -> bool:
    """Whether a node is large enough for one worker."""
    return resources.get("CPU", 0) >= scaling.cpus_per_worker and (not scaling.use_gpu or resources.get("GPU", 0) >= 1)
