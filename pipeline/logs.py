"""What processes that Ray starts have to say, as plain lines: Ray shows their standard error at the driver.

Imports no torch, because the watchman of `validating.py` needs none; `pipeline.runtime.get_logger` gives the loggers.
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
