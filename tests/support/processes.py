"""Child processes whose death a test notices at once, instead of waiting for an answer until its time-out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

ANSWER_SECONDS = 300  # for one message; starting a process that imports torch takes minutes on a very busy machine


class ChildPipe:
    """The parent's end of a pipe to a child process."""

    def __init__(self, pipe: Connection, process: Any) -> None:
        self._pipe = pipe
        self._process = process

    def send(self, message: Any) -> None:
        self._pipe.send(message)

    def recv(self) -> Any:
        """The child's next message. Raises AssertionError if the child ends without one, or takes too long."""
        assert self._pipe.poll(ANSWER_SECONDS), f"no answer from {self._process} within {ANSWER_SECONDS} s"
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join(ANSWER_SECONDS)
            raise AssertionError(f"{self._process} ended without an answer") from None


@contextmanager
def run_child(context: Any, target: Callable[..., None], *args: Any) -> Iterator[ChildPipe]:
    """Run `target(*args, pipe)` in a process of `context`; on leaving, it must end by itself with exit code 0."""
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*args, there))
    process.start()
    there.close()  # the child has the only copy now, so that its death ends the pipe
    try:
        with here:
            yield ChildPipe(here, process)
            process.join(ANSWER_SECONDS)
        assert process.exitcode == 0, str(process)
    finally:
        process.kill()
        process.join()
