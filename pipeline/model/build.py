"""From the sections `model` and `loss` to a detector and its criterion. Used by the worker, checkpoints, benchmarks."""

import torch

from pipeline.config import LossConfig, ModelConfig
from pipeline.logs import get_logger
from pipeline.model.baselines.base import OwnLosses
from pipeline.model.baselines.efficientdet import EfficientDet
from pipeline.model.baselines.faster_rcnn import FasterRCNN
from pipeline.model.baselines.fcos import FCOS
from pipeline.model.deformable import DeformableDETR
from pipeline.model.detector import Detector
from pipeline.model.detr import DETR
from pipeline.model.losses import SetCriterion
from pipeline.model.weights.files import read_weights
from pipeline.model.weights.init_from import start_from

log = get_logger("model")


def build_model(config: ModelConfig, load_backbone: bool = True) -> Detector:
    """The detector `config.name`, in training mode on the CPU.

    Args:
        config: the `model` section.
        load_backbone: False leaves `backbone.weights` and `init_from` unread, for a model that a checkpoint fills.

    Raises:
        ConfigError: settings that make no sense together.
        CheckpointError: weights that cannot be read or do not fit.
    """
    if not (load_backbone and config.init_from):
        return _construct(config, load_backbone)
    model, report = _started(config)
    log.info("%s", report)
    return model


def check_weights(config: ModelConfig) -> Detector:
    """The detector with the weights that a run starts from: what `build_model` would raise, before workers start.

    Raises:
        ConfigError, CheckpointError: see `build_model`.
    """
    return _started(config)[0] if config.init_from else _construct(config, load_backbone=True)


def _started(config: ModelConfig) -> tuple[Detector, str]:
    """A model with the weights of `init_from`, and what became of them; the file brings the backbone, too."""
    model = _construct(config, load_backbone=False)
    return model, start_from(model, read_weights(config.init_from), _resizable(config, model))


def _resizable(config: ModelConfig, model: Detector) -> set[str]:
    """Keys of the state_dict whose shape follows the number of classes or of queries."""
    sizes = {"num_classes": config.num_classes + 1, "queries": config.queries + 1}
    with torch.device("meta"):
        other = _construct(config.model_copy(update=sizes), load_backbone=False).state_dict()
    return {key for key, tensor in model.state_dict().items() if tensor.shape != other[key].shape}


def _construct(config: ModelConfig, load_backbone: bool) -> Detector:
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
