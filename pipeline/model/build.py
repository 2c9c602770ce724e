"""From the sections `model` and `loss` to a detector and its criterion. Used by the worker, checkpoints, benchmarks."""

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.model.deformable import DeformableDETR
from pipeline.model.detector import Detector
from pipeline.model.detr import DETR


def build_model(config: ModelConfig, load_backbone: bool = True) -> Detector:
    """The detector `config.name`, in training mode on the CPU.

    Args:
        config: the `model` section.
        load_backbone: False leaves `backbone.weights` and `init_from` unread, for a model that a checkpoint fills.

    Raises:
        ConfigError: settings that make no sense together.
        CheckpointError: weights that cannot be read or do not fit.
    """
    if config.name == "deformable_detr":
        return DeformableDETR(config, load_backbone)
    if config.name == "detr":
        return DETR(config, load_backbone)
    raise ConfigError(f"model.name={config.name} is not built yet")
