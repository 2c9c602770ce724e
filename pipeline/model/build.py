"""From the sections `model` and `loss` to a detector and its criterion. Used by the worker, checkpoints, benchmarks."""

from pipeline.config import LossConfig, ModelConfig
from pipeline.model.baselines import OwnLosses
from pipeline.model.deformable import DeformableDETR
from pipeline.model.detector import Detector
from pipeline.model.detr import DETR
from pipeline.model.efficientdet import EfficientDet
from pipeline.model.faster_rcnn import FasterRCNN
from pipeline.model.fcos import FCOS
from pipeline.model.losses import SetCriterion


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
    if config.name == "faster_rcnn":
        return FasterRCNN(config, load_backbone)
    if config.name == "efficientdet":
        return EfficientDet(config, load_backbone)
    return FCOS(config, load_backbone)  # fcos and atss


def build_criterion(config: LossConfig) -> SetCriterion | OwnLosses:
    """The criterion of the `loss` section; the number of classes is that of the outputs it gets."""
    return OwnLosses() if config.classification == "own" else SetCriterion(config)
