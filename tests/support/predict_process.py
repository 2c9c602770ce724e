"""`python -m jobs.predict` as a process that tests kill: it stops at chosen moments, and notes what it did until then.

Actors stop before an image, the driver in the middle of a file. Each moment is reached once in the life of a folder; a
test waits for its mark, and kills by process id. Nothing of it is known to the product.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from ray import cloudpickle

from jobs import cli, predict
from pipeline.files.atomic import replace_file
from pipeline.inference import predict_images, prediction_parts
from pipeline.inference.predict_images import BuildPrediction, PredictImages
from pipeline.inference.prediction_parts import PartFolder, Row
from pipeline.launch import prediction
from support.paths import ROOT

WAIT_SECONDS = 180.0
PART_IMAGES = 4
RESULTS = "results"  # a moment: half of the results are written; others are names of images, drawings and parts
RECEIVED = "received.txt"  # the images whose results the driver has


class Probe:
    """The work of a prediction; its actors note each image that they have computed, and stop before some."""

    def __init__(self, build: BuildPrediction, folder: Path, stops: Sequence[str]) -> None:
        self._build, self._folder, self._stops = build, folder, stops

    def __call__(self) -> PredictImages:
        detect, save = PredictImages._detect, predict_images.save_drawing

        def probed(work: PredictImages, item: int, *found: Any) -> Row:
            name = Path(work.images[item].source.name).name
            if name in self._stops:
                stop_once(self._folder, name)
            row = detect(work, item, *found)
            note(self._folder / f"computed_{os.getpid()}.txt", name)
            return row

        def save_drawing(image: Image, path: Path) -> None:
            if path.name in self._stops and not mark_of(self._folder, path.name).exists():
                with replace_file(path) as temporary:
                    temporary.write_bytes(b"half of it")
                    stop_once(self._folder, path.name)
            save(image, path)

        # In this process alone.
        PredictImages._detect, predict_images.save_drawing = probed, save_drawing  # type: ignore[method-assign]
        return self._build()


class PredictProcess:
    """A prediction of all images of a folder on two actors, or `workers`, of the Ray at `address`.

    Args:
        folder: its own, for outputs and notes.
        checkpoint: the model.
        images: a folder.
        address: of Ray.
        stops: the moments at which it stops: `04.jpg` before that image, `04.png` within its drawing,
            `part-000005.json` within that file, or RESULTS.
        workers: number of actors.
    """

    def __init__(
        self, folder: Path, checkpoint: Path, images: Path, address: str, stops: Sequence[str] = (), workers: int = 2
    ) -> None:
        self._notes, self.out = folder / "notes", folder / "out" / "found.json"
        for each in (self._notes, self.out.parent):
            each.mkdir(parents=True, exist_ok=True)
        outputs = ["--out", str(self.out), "--draw", str(folder / "drawn")]
        settings = ["--threshold", "0", "--top-k", "3", f"scaling.num_workers={workers}", "scaling.use_gpu=false"]
        self._words = [str(checkpoint), str(images), *outputs, *settings]
        self._order = json.dumps({"folder": str(self._notes), "stops": list(stops)})
        self._log, self._address = folder / "log", address
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or with the same command continue it."""
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from support.predict_process import main; main()", self._order, *self._words],
                cwd=self._notes,
                env={**os.environ, "RAY_ADDRESS": self._address, "PYTHONPATH": path},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def reach(self, *moments: str) -> list[int]:
        """Wait until it has stopped at these moments; returns the ids of the processes that did."""
        marks = [mark_of(self._notes, moment) for moment in moments]
        self._wait(lambda: all(mark.exists() for mark in marks), moments)
        return [int(mark.read_text()) for mark in marks]

    def receive(self, count: int) -> None:
        """Wait until its driver has the results of so many images."""
        self._wait(lambda: len(self.received) >= count, count)

    def _wait(self, until: Callable[[], bool], what: object) -> None:
        assert self.process
        deadline = time.monotonic() + WAIT_SECONDS
        while not until():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.said}"
            assert time.monotonic() < deadline, f"it did not come to {what}:\n{self.said}"
            time.sleep(0.05)

    def signal(self, number: int) -> int:
        """Send a signal to the process group of its driver, as a terminal does; returns the exit code."""
        assert self.process
        os.killpg(self.process.pid, number)
        return self.process.wait(timeout=WAIT_SECONDS)

    def finish(self) -> bytes:
        """Wait for its good end; returns the results files, and nothing else may be left beside them."""
        assert self.process
        code = self.process.wait(timeout=WAIT_SECONDS)
        assert code == 0, self.said
        files = {path.name: path.read_bytes() for path in self.out.parent.iterdir()}
        assert sorted(files) == ["found.images.json", "found.json"]
        return b"".join(files[name] for name in sorted(files))

    @property
    def said(self) -> str:
        return self._log.read_text()[-6000:]

    @property
    def received(self) -> list[str]:
        """The images whose results a driver has had."""
        path = self._notes / RECEIVED
        return path.read_text().splitlines() if path.exists() else []

    @property
    def computed(self) -> Counter[str]:
        """How often each image went through the model, in all starts."""
        return Counter(line for path in self._notes.glob("computed_*") for line in path.read_text().splitlines())

    def end(self) -> None:
        """End it, whatever it does."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait()


def main() -> None:
    """Entry point of `PredictProcess`."""
    order, words = json.loads(sys.argv[1]), sys.argv[2:]
    folder, stops = Path(order["folder"]), order["stops"]
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors do not see the folder of tests
    prediction_parts.PART_IMAGES = PART_IMAGES
    build, add, write = BuildPrediction.of, PartFolder.add, prediction.write_results

    def receiving(parts: PartFolder, image: int, row: Row) -> None:
        note(folder / RECEIVED, str(image))
        add(parts, image, row)

    def write_file(path: Path, content: bytes) -> None:
        with replace_file(path) as temporary:
            if path.name in stops and not mark_of(folder, path.name).exists():
                temporary.write_bytes(content[: len(content) // 2])
                stop_once(folder, path.name)
            temporary.write_bytes(content)

    def write_results(out: Path, rows: Iterable[tuple[int, Row]], names: Sequence[str], *rest: Any) -> None:
        write(out, stop_within(rows, len(names) // 2), names, *rest)

    def stop_within(rows: Iterable[tuple[int, Row]], place: int) -> Iterator[tuple[int, Row]]:
        for number, row in rows:
            if number == place and RESULTS in stops:
                stop_once(folder, RESULTS)
            yield number, row

    BuildPrediction.of = lambda *parts: Probe(build(*parts), folder, stops)  # type: ignore[assignment, method-assign]
    PartFolder.add = receiving  # type: ignore[method-assign]
    prediction_parts.write_file, prediction.write_results = write_file, write_results
    sys.exit(cli.main(predict.build_parser(), predict.run, words))


def mark_of(folder: Path, moment: str) -> Path:
    return folder / f"{moment}.pid"


def stop_once(folder: Path, moment: str) -> None:
    """Leave a mark and wait to be killed, at the first time."""
    mark = mark_of(folder, moment)
    if mark.exists():
        return
    temporary = mark.with_suffix(".writing")
    temporary.write_text(str(os.getpid()))
    temporary.replace(mark)
    time.sleep(WAIT_SECONDS)


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")
