"""Starts a verification, and waits for its verdict no longer than its caller wants to.

pycocotools needs a minute for the validation images of COCO. So a faster package gives the numbers at once, and a
process of the lowest priority (`process.py`) scores the last evaluation of a run again with pycocotools. It outlives
its starter, and records its verdict by itself: in the run's folder and as a tag of the MLflow run. If the two
differ, pycocotools' numbers stand. If the process is killed, the tag stays "pending" and no file is half written. A
process that cannot start is a warning.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pipeline
from pipeline.evaluation.coco import Scores
from pipeline.evaluation.summary import summarise
from pipeline.evaluation.verification.process import score_in_chunks
from pipeline.evaluation.verification.request import Place, Request, write_request
from pipeline.logs import get_logger
from pipeline.runs.verifications import Verdict

WAIT_SECONDS = 5.0  # for a verdict at the end of a run or command; the process continues alone
NICENESS = 19  # the lowest priority: it gets what training leaves
PROCESS = "pipeline.evaluation.verification.process"

log = get_logger("verification")


class Verification:
    """A running verification. Its starter may end before it, or be killed."""

    def __init__(self, request: Request) -> None:
        """Start it. Raises OSError and SubprocessError if that is impossible."""
        self.place = request.place
        self.died = False  # known after `wait`
        path = [str(Path(pipeline.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._pipe, output = os.pipe()
        try:
            with tempfile.TemporaryFile() as file:  # it has no name, so nothing remains of it
                write_request(file, request)
                # The shell ends at once, so the process is nobody's child: Ray ends the children of its workers.
                subprocess.run(
                    ["sh", "-c", 'exec "$0" "$@" &', sys.executable, "-m", PROCESS, str(file.fileno()), str(NICENESS)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(file.fileno(),),
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                    start_new_session=True,  # Ctrl-C in a terminal does not end it
                    check=True,
                )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(output)

    def wait(self, seconds: float) -> Verdict | None:
        """The verdict; None if it takes longer than `seconds`, or the process has died, see `died`. Call it once."""
        deadline = time.monotonic() + seconds
        pipe = select.poll()  # `select` refuses descriptors from 1024 on
        pipe.register(self._pipe, select.POLLIN)
        received = b""
        try:
            while pipe.poll(1000 * max(0.0, deadline - time.monotonic())):
                part = os.read(self._pipe, 65536)
                received += part
                if not part:
                    self.died = not received
                    return None if self.died else Verdict(**json.loads(received))
        finally:
            os.close(self._pipe)
        return None


def start_verification(scores: Scores, place: Place) -> Verification | None:
    """Start to verify `scores`; returns at once.

    Returns:
        The verification; None if there is nothing to verify, because pycocotools has computed `scores`, or if no
        process can be started.
    """
    if scores.backend == "pycocotools":
        return None
    used = f"{scores.backend} {version(scores.backend)}"
    try:
        return Verification(Request(scores.task, scores.arrays, scores.metrics, used, place))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("AP is not verified by pycocotools: its process cannot start (%s)", error)
        return None


def settle(verification: Verification | None, seconds: float = WAIT_SECONDS) -> Verdict | None:
    """Wait at most `seconds` for the verdict and report it; a difference is a warning."""
    if verification is None:
        return None
    verdict = verification.wait(seconds)
    if verification.died:
        log.warning(
            "AP is not verified: the process of the verification died; evaluation.backend=pycocotools needs none"
        )
    elif verdict is None and verification.place.exists:
        log.info("pycocotools is still verifying AP; MLflow's tag %s will hold the result", verification.place.tag)
    elif verdict is None:
        log.info("AP is not verified within %g s; evaluation.backend=pycocotools scores with pycocotools", seconds)
    elif verdict.differences:
        log.warning("%s. The numbers of pycocotools stand; please report this difference", verdict.summary)
    else:
        log.info("AP verified: %s", verdict.summary)
    return verdict


def verified(scores: Scores, place: Place | None = None, seconds: float = WAIT_SECONDS) -> Scores:
    """`scores` after at most `seconds` of verification; those of pycocotools if they differ."""
    verdict = settle(start_verification(scores, place or Place()), seconds)
    if verdict is None or not verdict.differences:
        return scores
    arrays = score_in_chunks(scores.task)
    return replace(scores, metrics=summarise(arrays), arrays=arrays, backend="pycocotools")
