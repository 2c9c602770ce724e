"""Ray clusters of several nodes on this machine."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._common.utils import get_default_ray_temp_dir, try_to_create_directory
from ray.cluster_utils import Cluster

from support.s3 import free_port


def ray_folder() -> str:
    """A folder for the files of a `Cluster`; to be removed."""
    # `Cluster` also notes its address in the usual folder, and fails on a machine where no Ray has made that yet.
    try_to_create_directory(get_default_ray_temp_dir())
    return tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: Ray's sockets have at most 107 characters


@contextmanager
def several_nodes(nodes: int = 2) -> Iterator[Cluster]:
    """A head that holds no worker and `nodes` raylets of one CPU, which share this machine's address and files."""
    folder = ray_folder()
    head = {"num_cpus": 0, "temp_dir": folder, "include_dashboard": False}
    head["dashboard_port"] = free_port()  # Ray tries it all the same, and leaks a socket if it is another Ray's
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=1)
        ray.init(address=made.address, logging_level="WARNING")
        made.wait_for_nodes()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
