"""The whole config of a run, and what its sections must agree on."""

from typing import Self

from pydantic import Field, model_validator

from pipeline.config.base import Location, Section
from pipeline.config.data import DataConfig
from pipeline.config.model import LossConfig, ModelConfig
from pipeline.config.published import PublishedConfig
from pipeline.config.training import EvaluationConfig, OptimConfig, ScalingConfig, TrackingConfig, TrainConfig


class Config(Section):
    """A whole run."""

    name: str = Field(
        "run", max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )  # run name; one folder under `storage`
    storage: Location = Field("runs", min_length=1)  # folder or fsspec URL that every worker can write
    seed: int = Field(42, ge=0, lt=2**64)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    published: PublishedConfig = PublishedConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data.labels == "raw" and self.model.num_classes != 91:
            raise ValueError("data.labels: raw is the published COCO layout and needs model.num_classes: 91")
        wanted = "focal" if self.model.class_head == "sigmoid" else "softmax"
        if self.model.name not in ("deformable_detr", "detr"):
            wanted = "own"
        if self.loss.classification != wanted:
            raise ValueError(
                f"model.name={self.model.name} with model.class_head={self.model.class_head} is trained with "
                f"loss.classification={wanted}, not {self.loss.classification}"
            )
        return self
