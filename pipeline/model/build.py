"""Builds the detector and its criterion from the sections `model` and `loss`.

Settings that do not fit together are a ConfigError, weights that do not fit a CheckpointError.
"""

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

# names of parameters by the word in `model.freeze`
FROZEN_PARTS = {"backbone": "backbone.", "encoder": "transformer.encoder."}

log = get_logger("model")


def build_model(config: ModelConfig, load_backbone: bool = True) -> Detector:
    """Build the detector `config.name`, in training mode on the CPU.

    Args:
        config: the `model` section.
        load_backbone: False ignores `backbone.weights` and `init_from`, for a model that is filled from a checkpoint.

    Raises:
        ConfigError: settings do not fit together.
        CheckpointError: weights cannot be read or do not fit.
    """
    if not (load_backbone and config.init_from):
        return _freeze(_construct(config, load_backbone), config)
    model, report = _build_initialised(config)
    log.info("%s", report)
    return _freeze(model, config)


def check_weights(config: ModelConfig) -> Detector:
    """Build the detector with a run's initial weights, so that `build_model`'s errors come before workers start.

    Raises:
        ConfigError, CheckpointError: see `build_model`.
    """
    model = _build_initialised(config)[0] if config.init_from else _construct(config, load_backbone=True)
    return _freeze(model, config)


def _freeze(model: Detector, config: ModelConfig) -> Detector:
    """The model without gradients in the parts that `freeze` names."""
    prefixes = tuple(FROZEN_PARTS[part] for part in config.freeze)
    for name, parameter in model.named_parameters():
        if prefixes and name.startswith(prefixes):
            parameter.requires_grad_(False)
    return model


def _build_initialised(config: ModelConfig) -> tuple[Detector, str]:
    """Build a model with the weights of `init_from`, backbone included; also returns a report of the loaded tensors."""
    model = _construct(config, load_backbone=False)
    return model, start_from(model, read_weights(config.init_from), _resizable(config, model))


def _resizable(config: ModelConfig, model: Detector) -> set[str]:
    """Keys of the state_dict whose shape depends on the number of classes or of queries."""
    sizes = {"num_classes": config.classes + 1, "queries": config.queries + 1}
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
    """Build the criterion of the `loss` section; it takes the number of classes from the outputs."""
    return OwnLosses() if config.classification == "own" else SetCriterion(config)
