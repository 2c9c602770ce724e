"""Work on Ray actors: the results of one process, also after an actor was killed; errors come unchanged."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.inference import small_detector, small_run

from jobs.cli import main
from jobs.evaluate import build_parser, run
from pipeline.config import EvaluationConfig, ScalingConfig
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.errors import ResourceError, ShardError, WorkersLostError
from pipeline.evaluation.evaluator import Result
from pipeline.inference import evaluate, pool
from pipeline.inference.evaluate import BuildDetection, evaluate_here, evaluate_on_actors, open_evaluator
from pipeline.inference.pool import run_on_actors

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_two_cpus")]
FOUR_VIEWS = EvaluationConfig(micro_batch=2, scales=(64, 96), flip=True)


def workers(count: int, **changes: Any) -> ScalingConfig:
    """Room for up to four on the two CPUs."""
    return ScalingConfig(num_workers=count, cpus_per_worker=0.5, use_gpu=False, **changes)


def squares(die_at: int = -1, marker: Path | None = None) -> Callable[[], Callable[[range], Iterator[int]]]:
    """A builder whose actors kill themselves at item `die_at`: the first one only, if there is a marker."""

    def build() -> Callable[[range], Iterator[int]]:
        def work(items: range) -> Iterator[int]:
            for item in items:
                if item == die_at and not (marker and marker.exists()):
                    if marker:
                        marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item * item

        return work

    return build


@pytest.mark.parametrize(("items", "count"), [(0, 2), (1, 3), (11, 2)])
def test_run_on_actors_gives_each_result_once(items: int, count: int) -> None:
    assert sorted(run_on_actors(squares(), items, workers(count))) == [(item, item * item) for item in range(items)]


def test_run_on_actors_killed_actor_is_replaced_without_loss_or_repeat(tmp_path: Path) -> None:
    found = list(run_on_actors(squares(7, tmp_path / "marker"), 20, workers(2)))
    assert (tmp_path / "marker").exists()
    assert sorted(found) == [(item, item * item) for item in range(20)]


def test_run_on_actors_too_many_deaths_raise() -> None:
    with pytest.raises(WorkersLostError, match=r"scaling\.max_failures=1"):
        list(run_on_actors(squares(7), 20, workers(2, max_failures=1)))


def test_run_on_actors_without_room_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "START_SECONDS", 0.5)
    with pytest.raises(ResourceError, match="64 CPUs"):
        list(run_on_actors(squares(), 3, ScalingConfig(cpus_per_worker=64, use_gpu=False)))


def test_run_on_actors_error_is_raised_unchanged_and_ends_all() -> None:
    def build() -> Callable[[range], Iterator[int]]:
        def work(items: range) -> Iterator[int]:
            for item in items:
                if item == 5:
                    raise ShardError("shard 5 is damaged")
                yield item

        return work

    with pytest.raises(ShardError, match=r"^shard 5 is damaged$"):
        list(run_on_actors(build, 12, workers(2)))


def test_run_on_actors_closed_early_ends_all_actors() -> None:
    def build() -> Callable[[range], Iterator[int]]:
        def work(items: range) -> Iterator[int]:
            for item in items:
                yield os.getpid()
                time.sleep(0.2 * (item > items[0]))

        return work

    results = run_on_actors(build, 1000, workers(2))
    processes = {process for _, process in islice(results, 8)}
    assert len(processes) == 2
    results.close()
    _, left = psutil.wait_procs([psutil.Process(pid) for pid in processes if psutil.pid_exists(pid)], timeout=20)
    assert left == []


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val")
    for name, images in (("eleven", 11), ("one", 1)):
        build_shards(*write_synthetic(folder / f"drawn_{name}", images=images, seed=4), folder / name)
    return folder


def digest(result: Result, folder: Path) -> tuple[str, dict[str, float]]:
    return result.detections.to_results_json(folder / "results.json"), result.metrics


@pytest.mark.parametrize(
    ("name", "count", "evaluation", "kill"),
    [
        ("eleven", 3, EvaluationConfig(), False),  # parts of 3, 3, 3 and 2 images
        ("one", 3, EvaluationConfig(), False),  # two workers have nothing to do
        ("eleven", 2, FOUR_VIEWS, True),
    ],
    ids=["uneven", "empty", "views_and_a_kill"],
)
def test_evaluate_on_actors_has_the_bits_of_one_process(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    count: int,
    evaluation: EvaluationConfig,
    kill: bool,
) -> None:
    config, inference = small_detector(shards / name, evaluation)
    evaluator = open_evaluator(config, inference, "cpu")
    expected = digest(evaluate_here(evaluator, inference, config), tmp_path)
    marker = tmp_path / "killed"
    if kill:
        monkeypatch.setattr(evaluate, "BuildDetection", lambda *args: dying(BuildDetection(*args), marker))
    found = evaluate_on_actors(evaluator, inference, config, workers(count))
    assert digest(found, tmp_path) == expected
    assert len(found.detections) > 0
    assert marker.exists() == kill


def dying(build: BuildDetection, marker: Path) -> Callable[[], Callable[[range], Iterator[Any]]]:
    """As `build`, but the first actor that is asked for a second group kills itself."""

    def build_dying() -> Callable[[range], Iterator[Any]]:
        detect = build()

        def work(items: range) -> Iterator[Any]:
            for item, result in zip(items, detect(items), strict=True):
                if item > items[0] and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield result

        return work

    return build_dying


def test_evaluate_command_on_a_worker_writes_the_same_files(tmp_path: Path) -> None:
    folder = small_run(tmp_path, tracked=False).folder
    written = []
    for place, settings in enumerate(([], ["scaling.num_workers=1"])):
        files = [tmp_path / f"{place}_{name}.json" for name in ("numbers", "results")]
        arguments = [folder, *settings, "--json", str(files[0]), "--save-results", str(files[1])]
        assert main(build_parser(), run, arguments) == 0
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]
