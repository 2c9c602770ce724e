"""The whole config of a run, and what its sections must agree on."""

from collections.abc import Iterator
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.config.base import Location, Section
from pipeline.config.data import DataConfig
from pipeline.config.model import LossConfig, ModelConfig
from pipeline.config.training import EvaluationConfig, OptimConfig, ScalingConfig, TrackingConfig, TrainConfig
from pipeline.files.credentials import login_fault


class Config(Section):
    """A whole run: its name, storage and seed, and a section for each part."""

    name: str = Field("run", max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run: its folder under `storage` and its name in MLflow.
    Letters, digits, dots, hyphens and underscores."""

    storage: Location = Field("runs", min_length=1)
    """Folder or fsspec URL for the runs' folders. Every worker must be able to write there.
    Several machines need a shared folder or a URL such as s3://bucket/runs."""

    seed: int = Field(42, ge=0, lt=2**64)
    """Seed of initial weights, order of samples, augmentation and dropout.
    Change it to measure how much results vary by chance."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def ends_by_itself(self) -> bool:
        """Whether a setting may end the run before its last step."""
        return self.train.patience is not None or self.train.max_minutes is not None

    @model_validator(mode="after")
    def _without_logins(self) -> Self:
        """A config is stored in many places, so no text in it may be an address with a login."""
        for key, text in _texts("", self.model_dump()):
            if fault := login_fault(text, key):
                raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data.labels == "raw" and self.model.num_classes not in (91, "auto"):
            raise ValueError("data.labels: raw is the published COCO layout and needs model.num_classes: 91")
        if self.ends_by_itself and self.evaluation.where == "tasks":
            raise ValueError(
                "train.patience and train.max_minutes need the AP between two steps, but evaluation.where: tasks "
                "brings it later; leave evaluation.where out"
            )
        if self.train.cast_weights_once and self.model.name not in ("deformable_detr", "detr"):
            raise ValueError(f"train.cast_weights_once is for deformable_detr and detr, not for {self.model.name}")
        wanted = "focal" if self.model.class_head == "sigmoid" else "softmax"
        if self.model.name not in ("deformable_detr", "detr"):
            wanted = "own"
        if self.loss.classification != wanted:
            raise ValueError(
                f"model.name={self.model.name} with model.class_head={self.model.class_head} is trained with "
                f"loss.classification={wanted}, not {self.loss.classification}"
            )
        return self


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(f"{key}.{name}".lstrip("."), inner)
    elif isinstance(value, str):
        yield key, value
