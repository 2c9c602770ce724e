"""The settings of a server, which belong to no run: `jobs.serve` has a flag for each, a Serve config file an entry."""

import ipaddress
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.config.base import Count, Section


def _check_host(host: str) -> str:
    if host != "localhost":
        ipaddress.ip_address(host)
    return host


class ServingConfig(Section):
    """A server of one model: where it listens, how it computes, and what a request may cost."""

    host: Annotated[str, AfterValidator(_check_host)] = "127.0.0.1"
    """Address to listen on. The default is reached from this machine alone; 0.0.0.0 is every network.
    Other addresses than loopback need a token."""

    port: int = Field(8000, ge=1, le=65_535)
    """Port to listen on."""

    replicas: int = Field(1, ge=1, le=1000)
    """Processes that each hold the model. A replica that dies is replaced while the others answer."""

    cpus_per_replica: float = Field(1, ge=0.001, le=1000)
    """CPUs that Ray reserves for each replica; without a GPU it is also the number of threads."""

    use_gpu: bool | Literal["auto"] = "auto"
    """Whether every replica gets a GPU. `auto` uses GPUs if the cluster has one for every replica."""

    batch_size: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = "auto"
    """Largest number of images of equal size that go through the model together.
    `auto` is 8 on a GPU and 1 on a CPU, which gains little by batches and then gives the bits of `load_detector`."""

    batch_wait_ms: float = Field(5, ge=0, le=10_000)
    """Milliseconds that the first image of a batch waits for others. Without effect if `batch_size` is 1."""

    max_bytes: int = Field(32 * 2**20, ge=1024, le=256 * 2**20)
    """Bytes of a request. An image in JSON is base64, a third larger than its file."""

    max_pixels: int = Field(20_000_000, ge=1, le=64_000_000)
    """Pixels of an image, known from its header before any pixel is decoded."""

    timeout_s: float = Field(30, gt=0, le=3600)
    """Seconds from a request's first byte to its answer, upload and waiting included.
    Its body must arrive in the first half."""

    max_waiting: Count = 64
    """Requests that may wait for a replica; a further one is refused with 429. A request holds up to `max_bytes`."""

    max_uploads: int = Field(64, ge=1, le=10_000)
    """Requests whose bodies may arrive at a time, beside those that wait. A further one takes the place of a slow one
    (less than 16 KiB/s after 2 s, which gets 408), or is refused with 429. An upload holds up to `max_bytes`."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback

    @property
    def max_in_flight(self) -> int:
        """Requests whose bodies are there, of all replicas together: those that wait, and those that are computed."""
        return self.max_waiting + self.replicas * self.per_replica(gpu=True)

    def per_replica(self, gpu: bool) -> int:
        """Requests that a replica has at a time: a batch that is computed, and the next one."""
        return 2 * self.resolved_batch_size(gpu)

    def resolved_batch_size(self, gpu: bool) -> int:
        """`batch_size` of a replica with or without a GPU."""
        return (8 if gpu else 1) if self.batch_size == "auto" else self.batch_size
