"""The project's loggers, and their set-up in processes of Ray, whose messages the driver shows as plain lines.

It does not import torch, so that commands and the evaluation's supervisor start fast.
"""

import logging


def log_to_driver(level: int = logging.INFO) -> None:
    """Show the project's messages from `level` on, and warnings of other packages; Ray Train logs whole reports."""
    logging.getLogger().setLevel(logging.WARNING)
    project = logging.getLogger("pipeline")
    project.setLevel(level)
    if not project.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        project.addHandler(handler)
    project.propagate = False


def get_logger(name: str) -> logging.Logger:
    """A logger below `pipeline`, so that one level applies to all."""
    return logging.getLogger(f"pipeline.{name}")
