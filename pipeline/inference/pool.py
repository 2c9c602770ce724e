"""Numbered items of work on Ray actors, each of which builds what it needs, such as a model, once.

An actor gets consecutive items, and its results come back one by one. If an actor dies, another one replaces it and
does what is left: every item has exactly one result. The work on an item must not depend on other items; then results
do not depend on the number of actors. Ray must have been started. A PipelineError of the work is raised unchanged. Too
many deaths are a WorkersLostError; a cluster without room for a single actor is a ResourceError.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import ray
import ray.util.client
from ray.exceptions import RayError, RayTaskError

from pipeline.config import ScalingConfig
from pipeline.errors import PipelineError, ResourceError, WorkersLostError
from pipeline.logs import get_logger, log_to_driver

SMALLEST_PART = 4  # items; a part's first item waits for its data, which the others read ahead
POLL_SECONDS = 1.0
LOG_SECONDS = 30.0  # between messages that actors are not started yet
START_SECONDS = 600.0  # for the first actor, in addition to `scaling.wait_minutes`

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
log = get_logger("inference")


class Work(Protocol[R_co]):
    """What an actor does with its items."""

    def __call__(self, items: range, /) -> Iterator[R_co]:
        """One result for each of `items`, in their order."""


def plan_parts(items: int, workers: int) -> list[range]:
    """Consecutive parts that hold every item exactly once, in the order in which they are handed out.

    A part is half of an equal share of what is left, so that parts become smaller and all workers end at about the same
    time. Every worker gets a part if there are enough items.

    Args:
        items: at least 0.
        workers: at least 1; one worker gets a single part.
    """
    parts: list[range] = []
    smallest = max(1, min(SMALLEST_PART, items // workers))
    start = 0
    while start < items:
        left = items - start
        size = left if workers == 1 else min(left, max(smallest, -(-left // (2 * workers))))
        parts.append(range(start, start + size))
        start += size
    return parts


def run_on_actors(
    build: Callable[[], Work[R]], items: int, scaling: ScalingConfig, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[int, R]]:
    """Yield (item, result) of `items` items in order of completion. At the end, or if it is closed, all actors end.

    Args:
        build: is sent to each actor and called there once. It must not refer to Ray objects.
        items: their number; an actor is started for each part at most.
        scaling: resources of an actor, with `use_gpu` resolved; `max_failures` limits how many may die.
        environment: variables of the actors' processes.

    Raises:
        PipelineError: what the work raised.
        WorkersLostError: more actors died than `scaling.max_failures`.
        ResourceError: no actor could be started, or Ray is reached through Ray Client.
    """
    if ray.util.client.ray.is_connected():
        raise ResourceError(
            "Ray Client (ray://) cannot stream results; run the command in the cluster: `ray job submit`"
        )
    actors = _Actors(build, plan_parts(items, scaling.num_workers), scaling, dict(environment or {}))
    try:
        yield from actors.results()
    finally:
        actors.close()


class InferenceActor:
    """In a process of its own. It is built by a call, because Ray reports errors of a constructor as a death."""

    def build(self, build: Callable[[], Work[R]]) -> None:
        """Make what the work needs."""
        log_to_driver()
        self._work = build()

    def run(self, items: range) -> Iterator[tuple[int, Any]]:
        """Each item with its result."""
        results = self._work(items)
        for item in items:  # not `yield from zip(...)`, which Ray cannot resume
            yield item, next(results)


@dataclass
class _Member:
    """An actor as the driver sees it."""

    handle: Any
    pending: Any  # reference of `build`, or the stream of `run`; None while it has nothing to do
    built: bool = False
    left: range = range(0)  # items of its part without a result


class _Actors(Generic[R]):
    """All actors of one piece of work, and the parts that nobody works on."""

    def __init__(
        self, build: Callable[[], Work[R]], parts: list[range], scaling: ScalingConfig, environment: dict[str, str]
    ) -> None:
        self._waiting = deque(parts)
        self._scaling = scaling
        self._members: list[_Member] = []
        self._deaths = 0
        self._since = self._logged = time.monotonic()  # no actor is built since
        self._build = ray.put(build)
        self._kind: Any = ray.remote(
            num_cpus=scaling.cpus_per_worker,
            num_gpus=1 if scaling.use_gpu is True else 0,
            max_restarts=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment},
        )(InferenceActor)

    def results(self) -> Iterator[tuple[int, R]]:
        """See `run_on_actors`."""
        while self._waiting or any(member.left for member in self._members):
            self._hand_out()
            pending = {member.pending: member for member in self._members if member.pending is not None}
            ready, _ = ray.wait(list(pending), timeout=POLL_SECONDS)
            for reference in ready:
                yield from self._receive(pending[reference])
            self._check_start()

    def close(self) -> None:
        """End all actors, also those at work."""
        for member in self._members:
            ray.kill(member.handle)
        self._members.clear()

    def _hand_out(self) -> None:
        for member in self._members:
            if member.pending is None and self._waiting:
                member.left = self._waiting.popleft()
                member.pending = member.handle.run.options(num_returns="streaming").remote(member.left)
        starting = sum(not member.built for member in self._members)
        for _ in range(min(len(self._waiting) - starting, self._scaling.num_workers - len(self._members))):
            handle = self._kind.remote()
            self._members.append(_Member(handle, handle.build.remote(self._build)))

    def _receive(self, member: _Member) -> Iterator[tuple[int, R]]:
        """The result that an actor has; none if it has been built, is done with its part, or has died."""
        try:
            if not member.built:
                ray.get(member.pending)
                member.built, member.pending = True, None
                return
            item, result = ray.get(next(member.pending))
        except StopIteration:
            assert not member.left, f"items {member.left} have no result"
            member.pending = None
            return
        except RayTaskError as error:
            if isinstance(error.cause, PipelineError):
                raise error.cause from None
            raise
        except RayError as error:
            self._replace(member, error)
            return
        assert item == member.left[0], f"item {item} instead of {member.left[0]}"
        member.left = member.left[1:]
        yield item, result

    def _replace(self, member: _Member, error: RayError) -> None:
        """Forget an actor that has died; what is left of its part comes next."""
        self._deaths += 1
        self._members.remove(member)
        ray.kill(member.handle)  # the connection may be lost and not the actor
        if member.left:
            self._waiting.appendleft(member.left)
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        if 0 <= self._scaling.max_failures < self._deaths:
            raise WorkersLostError(
                f"{self._deaths} worker processes died, more than scaling.max_failures={self._scaling.max_failures}; "
                f"if memory ran out, lower scaling.num_workers. The last one: {reason}"
            )
        log.warning("a worker process died, another one does what is left of its work: %s", reason)

    def _check_start(self) -> None:
        built, now = sum(member.built for member in self._members), time.monotonic()
        if built:
            self._since = now
        if built == len(self._members):
            self._logged = now
        elif now - self._logged > LOG_SECONDS:
            self._logged = now
            log.info("%d of %d workers are ready; the others load, or wait for resources", built, len(self._members))
        if now - self._since > START_SECONDS + 60 * self._scaling.wait_minutes:
            raise ResourceError(
                f"no worker of {self._scaling.cpus_per_worker:g} CPUs{' and a GPU' * (self._scaling.use_gpu is True)} "
                f"could be started within {now - self._since:.0f} s; free resources of the Ray cluster, or ask for less"
            )
