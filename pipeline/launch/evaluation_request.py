"""What may be asked of the evaluation of a trained model, checked before PyTorch is loaded. Raises ConfigError."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import Config, ScalingConfig, flatten, override
from pipeline.config.base import map_locations
from pipeline.errors import ConfigError
from pipeline.files.storage import make_absolute

WORKERS, THREADS = "scaling.num_workers", "scaling.cpus_per_worker"
OPEN: tuple[str, ...] = ("data.val", "data.workers", "data.augment.eval_size", "data.augment.max_size")
OPEN += ("data.cache_dir", "data.cache_gib", "evaluation.", WORKERS, THREADS, "scaling.use_gpu")
OPEN += ("scaling.wait_minutes", "scaling.max_failures")
OPEN_KEYS = ", ".join(f"{key}*" if key.endswith(".") else key for key in OPEN)  # for messages
# Settings that change no number.
NEUTRAL: tuple[str, ...] = (
    "data.workers",
    "data.cache_dir",
    "data.cache_gib",
    "evaluation.where",
    "evaluation.task_minutes",
)
NEUTRAL += ("evaluation.backend", "scaling.")
VALIDATION = "val"
SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,49}")


@dataclass(frozen=True)
class EvaluationRequest:
    """A request that is well formed."""

    model: str  # as `registry.locate.checkpoint_folder` takes it
    overrides: tuple[str, ...]
    split: str  # name of the data, before each number in MLflow; empty if it was not given
    log: bool  # whether the result is logged in MLflow
    tracking_uri: str | None

    @property
    def on_actors(self) -> bool:
        """Whether workers were asked for; else this process evaluates."""
        return WORKERS in self._keys()

    @property
    def fixes_threads(self) -> bool:
        """Whether the number of threads of a process on a CPU was asked for; else this process uses all cores."""
        return THREADS in self._keys()

    def apply(self, recorded: Config) -> Config:
        """The config of a checkpoint with the settings of this evaluation; paths are absolute.

        Raises:
            ConfigError: a setting is out of bounds, or the log needs a name for other data or settings.
        """
        plain = recorded.model_copy(update={"scaling": ScalingConfig()})  # that of the training means nothing here
        config = override(plain, list(self.overrides))
        before, after = flatten(plain), flatten(config)
        changed = [key for key in self._keys() if before[key] != after[key] and not key.startswith(NEUTRAL)]
        if self.log and not self.split and changed:
            raise ConfigError(
                f"--log with another {', '.join(changed)} than in training: name the result, such as --split test; "
                "--split val says that it is comparable with the evaluations of the training"
            )
        return map_locations(config, make_absolute)

    def _keys(self) -> list[str]:
        return [text.partition("=")[0] for text in self.overrides]


def check_request(
    model: str, overrides: Sequence[str], split: str | None = None, log: bool = False, tracking_uri: str | None = None
) -> EvaluationRequest:
    """Check what needs no model. Raises ConfigError for a closed setting, a wrong value or a name that is none."""
    closed = [text for text in overrides if not text.partition("=")[0].startswith(OPEN)]
    if closed:
        raise ConfigError(f"{', '.join(closed)}: for a trained model only {OPEN_KEYS} can be set")
    override(Config(), list(overrides))
    if split is not None and not SPLIT_NAME.fullmatch(split):
        raise ConfigError(f"--split {split!r}: give a name of letters, digits, - and _, such as test")
    return EvaluationRequest(model, tuple(overrides), split or "", log, tracking_uri)
