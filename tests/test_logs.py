"""Messages that reach the driver."""

import logging
from collections.abc import Iterator

import pytest

from pipeline.logs import log_to_driver


@pytest.fixture
def loggers() -> Iterator[logging.Logger]:
    """The project's logger, and the root, given back as they were."""
    project, root = logging.getLogger("pipeline"), logging.getLogger()
    before = (project.level, project.propagate, [*project.handlers], root.level)
    project.handlers, project.propagate = [], True  # as in a process in which no other test has set them
    yield project
    project.setLevel(before[0])
    project.propagate = before[1]
    project.handlers = before[2]
    root.setLevel(before[3])


def test_log_to_driver_own_messages_and_foreign_warnings(
    loggers: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    log_to_driver()
    log_to_driver()  # a process may run several evaluations
    logging.getLogger("pipeline.training.worker").info("each step: %s", 8)
    assert capsys.readouterr().err == "each step: 8\n"
    assert not logging.getLogger("/ray/train/context.py").isEnabledFor(logging.INFO)
    assert logging.getLogger("/ray/train/context.py").isEnabledFor(logging.WARNING)
    log_to_driver(logging.WARNING)
    logging.getLogger("pipeline.training.worker").info("each step: %s", 8)
    assert capsys.readouterr().err == ""
