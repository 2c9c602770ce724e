"""Loggers of the project, and how processes that Ray starts show their messages as plain lines at the driver.

Imports no torch, so that commands and the evaluation's supervisor start fast.
"""

import logging


def log_to_driver(level: int = logging.INFO) -> None:
    """Let the project's messages from `level` on through, and warnings of others: Ray Train prints whole reports."""
    logging.getLogger().setLevel(logging.WARNING)
    project = logging.getLogger("pipeline")
    project.setLevel(level)
    if not project.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        project.addHandler(handler)
    project.propagate = False


def get_logger(name: str) -> logging.Logger:
    """A logger under `pipeline`, so that one level rules all of it."""
    return logging.getLogger(f"pipeline.{name}")
