"""A backbone's initial weights: torchvision's by name, a local file, or none.

Every rank loads them, because DeepSpeed does not broadcast buffers and frozen batch norm consists of buffers. Loading
is strict: one CheckpointError lists keys that are missing, extra or of another shape, and the backbone is unchanged.
"""

import re
from functools import partial
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import BackboneConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.logs import get_logger
from pipeline.model.weights.published import load_strict

log = get_logger("model.backbone")
_NAME = re.compile(r"\w+")  # a set of weights in torchvision, such as IMAGENET1K_V2
_CLASSIFIER = re.compile(r"(fc|classifier|features\.8)\.")  # features.8 is EfficientNet's last convolution
_FRESH = ".conv_offset."  # of deformable convolutions: no plain network has them


def load_backbone_weights(body: nn.Module, config: BackboneConfig) -> None:
    """Load `config.weights` into a backbone.

    Args:
        body: the module whose keys are those of the file: torchvision's, without the classifier.
        config: the `model.backbone` section; `weights: imagenet` is torchvision's IMAGENET1K_V1, that of the papers.

    Raises:
        ConfigError: this backbone has no weights of that name, or they need batch norm instead of group norm.
        CheckpointError: weights cannot be downloaded or read, or do not fit.
    """
    if config.weights == "none":
        return
    name = "IMAGENET1K_V1" if config.weights == "imagenet" else config.weights
    published = _NAME.fullmatch(name) is not None and not Path(name).exists()
    tensors = _torchvision(config, name) if published else _read(Path(name))
    kept = {k: v for k, v in tensors.items() if not _CLASSIFIER.match(k) and not k.endswith("num_batches_tracked")}
    fresh: dict[str, Tensor] = {}
    if not any(_FRESH in key for key in kept):
        fresh = {key: tensor for key, tensor in body.state_dict().items() if _FRESH in key}
    load_strict(body, kept | fresh, f"model.backbone.weights={config.weights}")
    unused = [key for key in tensors if _CLASSIFIER.match(key)]
    log.info(
        "model.backbone.weights=%s: %d tensors loaded, %d newly initialised, %s not used",
        *(config.weights, len(kept), len(fresh), ", ".join(unused) or "none"),
    )


def _torchvision(config: BackboneConfig, name: str) -> dict[str, Tensor]:
    """Read torchvision's weights, which are downloaded once into torch's hub cache."""
    if config.name == "conv5":
        raise ConfigError(
            "model.backbone.name=conv5 has no ImageNet weights; set model.backbone.weights=none, or a local file"
        )
    choices = torchvision.models.get_model_weights(config.name).__members__
    if name not in choices:
        raise ConfigError(
            f"model.backbone.weights={config.weights}: there is no such file, and torchvision's weights of "
            f"{config.name} are {', '.join(choices)}"
        )
    if config.norm == "group":
        raise ConfigError(
            "ImageNet weights were trained with batch norm; set model.backbone.norm=frozen_batch, or "
            "model.backbone.weights=none to train from scratch"
        )
    weights = choices[name]
    try:
        tensors: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # network, disk and damaged files raise a dozen types
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise CheckpointError(
            f"model.backbone.weights={config.weights}: cannot download or read them ({_reason(error)}). Fetch "
            f"{weights.url} on a machine with network access and place the file in {folder} of every node (replace "
            "a damaged one), or set model.backbone.weights=PATH or model.backbone.weights=none"
        ) from error
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    read = load_file if path.suffix == ".safetensors" else partial(torch.load, map_location="cpu", weights_only=True)
    try:
        tensors = read(path)
    except Exception as error:  # the readers raise a dozen types for damaged files, and none names the setting
        raise CheckpointError(f"model.backbone.weights: cannot read {path}: {_reason(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"model.backbone.weights: {path} must hold a flat state_dict of tensors")
    return tensors


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
