"""`jobs.predict` on actors after kills and Ctrl-C: no image lost or done again but for its part, the same bytes."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from support.helpers import tiny_checkpoint, write_image
from support.predict_process import PART_IMAGES, RESULTS, PredictProcess

from pipeline.files.atomic import UNFINISHED
from pipeline.inference.pool import plan_parts

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_two_cpus"),
]
NAMES = [f"{number:02d}.jpg" for number in range(24)]
STOPS = (4, 18)  # images before which the two actors stop: one has then done 0-3, the other one 6-17
AGAIN = (6, 7, 16, 17)  # done images whose parts, of four images each, are not complete then
STOPPED = pytest.mark.parametrize(  # signal and exit code
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)], ids=["SIGKILL", "Ctrl-C"]
)
Start = Callable[..., PredictProcess]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and `images`."""
    project = tmp_path_factory.mktemp("project")
    tiny_checkpoint(project)
    (project / "images").mkdir()
    for number, name in enumerate(NAMES):
        write_image(project / "images" / name, (60 + 3 * number, 80), seed=number)
    return project


@pytest.fixture(scope="module")
def undisturbed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The results files of a prediction that nothing happens to."""
    process = PredictProcess(tmp_path_factory.mktemp("whole"), project / "checkpoint", project / "images", address())
    process.start()
    found = process.finish()
    assert {row["file_name"].rpartition("/")[2] for row in json.loads(process.out.read_bytes())} == {*NAMES}
    assert process.computed == dict.fromkeys(NAMES, 1)
    return found


@pytest.fixture
def start(project: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a prediction that stops at these moments."""
    started: list[PredictProcess] = []

    def start(*stops: str, workers: int = 2) -> PredictProcess:
        started.append(
            PredictProcess(tmp_path, project / "checkpoint", project / "images", address(), stops, workers=workers)
        )
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.end()


def address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def assert_done(process: PredictProcess, undisturbed: bytes, again: tuple[int, ...]) -> None:
    """It ends with the bytes of an undisturbed prediction, and only the images `again` were computed twice."""
    assert process.finish() == undisturbed
    assert process.computed == {name: 1 + (number in again) for number, name in enumerate(NAMES)}
    drawings = sorted(path.name for path in (process.out.parents[1] / "drawn").iterdir())
    assert drawings == [f"{Path(name).stem}.png" for name in NAMES], "none is left unfinished"


def assert_says_how_to_continue(process: PredictProcess, number: int, kept: int) -> None:
    """The last line after Ctrl-C; nothing is written yet."""
    assert not process.out.exists()
    if number == signal.SIGINT:
        text = f"stopped: {kept} of 24 images are kept in {process.out}.parts; the same command continues"
        assert process.said.splitlines()[-1] == text


def assert_ended(actors: list[int]) -> None:
    """The processes of actors end with their driver: no memory, and no GPU, stays in use."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in actors if psutil.pid_exists(pid)], timeout=60)
    assert alive == []


def test_stops_lie_in_parts_of_both_actors() -> None:
    """What STOPS and AGAIN say of the plan."""
    parts = plan_parts(len(NAMES), 2)
    first, second = (next(part for part in parts if stop in part) for stop in STOPS)
    assert first == parts[0]
    done = [*range(first.start, STOPS[0]), *range(first.stop, STOPS[1])]
    whole = [start for start in range(0, len(NAMES), PART_IMAGES) if {*range(start, start + PART_IMAGES)} <= {*done}]
    assert second != first
    assert tuple(image for image in done if image // PART_IMAGES * PART_IMAGES not in whole) == AGAIN


def test_predict_killed_actors_are_replaced_without_loss_or_repeat(start: Start, undisturbed: bytes) -> None:
    moments = (NAMES[STOPS[0]], f"{STOPS[1]}.png")  # the second one within a drawing
    process = start(*moments)
    actors = process.reach(*moments)
    process.receive(len(NAMES) - 8)
    for pid in actors:
        psutil.Process(pid).kill()
    assert_done(process, undisturbed, again=())
    assert process.said.count("a worker process died, another one does what is left of its work") == 2
    assert sorted(map(int, process.received)) == [*range(len(NAMES))]


@STOPPED
def test_predict_stopped_driver_continues_by_part_with_the_same_command(
    number: int, code: int, start: Start, undisturbed: bytes
) -> None:
    process = start(*(NAMES[stop] for stop in STOPS))
    actors = process.reach(*(NAMES[stop] for stop in STOPS))
    process.receive(len(NAMES) - 8)
    assert process.signal(number) == code, process.said
    assert_says_how_to_continue(process, number, 12)
    assert_ended(actors)
    process.start()
    assert_done(process, undisturbed, AGAIN)
    assert "12 of 24 images were done before" in process.said


@pytest.mark.parametrize("renamed", [False, True], ids=["temporary", "renamed"])
def test_predict_killed_within_its_last_part_does_that_part_again(
    renamed: bool, start: Start, undisturbed: bytes
) -> None:
    part = "part-000005.json"
    process = start(part, workers=1)
    process.reach(part)
    process.signal(signal.SIGKILL)
    parts = process.out.with_name("found.json.parts")
    (half,) = [path for path in parts.iterdir() if UNFINISHED.match(path.name)]
    with pytest.raises(ValueError, match="char"):
        json.loads(half.read_bytes())
    if renamed:  # a disk that lost power may have the new name and not all of its bytes
        half.replace(parts / part)
    process.start()
    assert_done(process, undisturbed, again=(20, 21, 22, 23))


@STOPPED
def test_predict_stopped_within_its_results_writes_them_again(
    number: int, code: int, start: Start, undisturbed: bytes
) -> None:
    process = start(RESULTS)
    process.reach(RESULTS)
    assert process.signal(number) == code, process.said
    assert_says_how_to_continue(process, number, 24)
    process.start()
    assert_done(process, undisturbed, again=())
