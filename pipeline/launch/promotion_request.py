"""What `jobs.promote` is asked for, and the checks that need neither MLflow nor data. Imports nothing heavy.

A mistake is an InputError, before anything is loaded or written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.names import check_alias, check_model_name, check_new_alias
from pipeline.errors import ConfigError, InputError
from pipeline.evaluation.summary import METRICS
from pipeline.launch.evaluation_request import check_request as check_evaluation

SPLIT = "val/"


@dataclass(frozen=True)
class PromotionRequest:
    """The arguments of `jobs.promote`."""

    name: str  # registered model
    source: str = "challenger"  # alias or number of the version that may be promoted
    target: str = "champion"  # alias that it gets
    metric: str = "val/AP"
    min_gain: float = 0.002
    no_class_below: float = -0.02
    overrides: Sequence[str] = ()  # `key=value` of the evaluation
    force: bool = False
    rollback: bool = False
    draws: int = 200  # of the bootstrap
    tracking_uri: str | None = None

    @property
    def number(self) -> str:
        """The metric's name without the split."""
        return self.metric.removeprefix(SPLIT)

    @property
    def shards(self) -> str | None:
        """The value of `data.val=` among the overrides."""
        given = [text.partition("=")[2] for text in self.overrides if text.startswith("data.val=")]
        return given[-1] if given else None


def check_request(request: PromotionRequest) -> None:
    """Refuse arguments that are not valid or do not fit together.

    Raises:
        InputError: what is wrong; names and versions are looked up later.
    """
    try:
        check_model_name(request.name)
    except ValueError as error:
        raise InputError(f"NAME: {error}") from None
    for flag, alias, check in (("--from", request.source, check_alias), ("--to", request.target, check_new_alias)):
        try:
            check(alias)
        except ValueError as error:
            raise InputError(f"{flag}: {error}") from None
    if request.target.isdecimal():
        raise InputError(f"--to {request.target} is a version; give an alias, such as champion")
    if request.number not in METRICS:
        known = ", ".join(f"{SPLIT}{name}" for name in METRICS)
        raise InputError(f"--metric {request.metric} is none of {known}")
    for flag, value in (("--min-gain", request.min_gain), ("--no-class-below", request.no_class_below)):
        if not -1 <= value <= 1:  # also refuses NaN
            raise InputError(f"{flag} {value:g} must be a difference of fractions, from -1 to 1; two points are 0.02")
    if request.draws < 0:
        raise InputError(f"--draws {request.draws} must be at least 0")
    if request.force and request.rollback:
        raise InputError("--force and --rollback exclude each other")
    if request.rollback and request.source != PromotionRequest.source:
        raise InputError(f"--rollback gives @{request.target} to the version before, so it takes no --from")
    if request.overrides and (request.force or request.rollback):
        flag = "--force" if request.force else "--rollback"
        raise ConfigError(f"{flag} compares nothing, so it takes no settings: {', '.join(request.overrides)}")
    check_evaluation(f"models:/{request.name}@{request.source}", request.overrides)
