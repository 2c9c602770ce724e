"""Strict loading with a full report, and the published checkpoint layouts of both DETRs.

The published layouts prefix the backbone with `backbone.0`. Deformable DETR's layout also gives shared heads several
names, while this project names each tensor once. `official_names` maps between them in both directions. Weights that
do not fit are a CheckpointError.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    from pipeline.model.detector import Detector

_LISTED = 8  # maximum number of keys of one kind that a report names
STRAY = ("total_params", "total_ops")  # left in published files by a profiler


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module whose state_dict has exactly these keys and shapes.

    Raises:
        CheckpointError: keys are missing, extra or of another shape, all listed; the module is unchanged.
    """
    own = module.state_dict()
    check_fit(source, {key: tensor.shape for key, tensor in own.items()}, tensors)
    module.load_state_dict(dict(tensors))


def official_names(model: "Detector") -> dict[str, list[str]]:
    """Each key of the model's state_dict -> its names in the published layout, one or more.

    Raises:
        CheckpointError: the model's backbone has no published counterpart.
    """
    backbone = model.config.backbone
    if backbone.name == "conv5" or backbone.norm != "frozen_batch":
        raise CheckpointError(
            "the published layout exists only for ResNets with frozen batch norm; set model.backbone.name=resnet50 and "
            "model.backbone.norm=frozen_batch"
        )
    return {key: _official(key, model) for key in model.state_dict()}


def _official(key: str, model: "Detector") -> list[str]:
    part, _, rest = key.partition(".")
    if part == "backbone":
        return [f"backbone.0.{rest}"]
    config = model.config
    if part not in ("class_embed", "bbox_embed") or config.name == "detr":
        return [key]
    if not config.refine:  # one head under the name of every layer
        leaf = rest.partition(".")[2]
        return [f"{part}.{layer}.{leaf}" for layer in range(config.dec_layers)]
    in_decoder = part == "bbox_embed" or config.two_stage
    return [key, f"transformer.decoder.{key}"] if in_decoder else [key]


def load_official(model: "Detector", state_dict: Mapping[str, Tensor]) -> None:
    """Load a published checkpoint's `model` entry into a model of the same variant.

    Args:
        model: built with the checkpoint's sizes and variant (num_classes 91 for COCO).
        state_dict: published keys; a profiler's keys are ignored, and names of one tensor must agree.

    Raises:
        CheckpointError: keys are missing, extra or of another shape, or aliases differ; the model is unchanged.
    """
    names = official_names(model)
    given = {key: tensor for key, tensor in state_dict.items() if key.rpartition(".")[2] not in STRAY}
    own = model.state_dict()
    check_fit("published layout", {alias: own[key].shape for key, aliases in names.items() for alias in aliases}, given)
    differing = [
        f"{first} and {alias}"
        for first, *rest in names.values()
        for alias in rest
        if not torch.equal(given[first], given[alias])
    ]
    if differing:
        raise CheckpointError(
            "published layout: names of one tensor hold different values; is it a checkpoint of another variant? "
            f"(model.refine, model.two_stage): {shorten_list(differing)}"
        )
    model.load_state_dict({key: given[aliases[0]] for key, aliases in names.items()})


def export_official(model: "Detector") -> dict[str, Tensor]:
    """The model's weights under every name of the published layout (aliases share memory)."""
    own = model.state_dict()
    return {alias: own[key] for key, aliases in official_names(model).items() for alias in aliases}


def check_fit(source: str, wanted: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> None:
    """Raise a CheckpointError that lists everything that does not fit."""
    shapes = [
        f"{key} {list(given[key].shape)} instead of {list(shape)}"
        for key, shape in wanted.items()
        if key in given and given[key].shape != shape
    ]
    faults = {
        "missing": [key for key in wanted if key not in given],
        "extra": [key for key in given if key not in wanted],
        "of another shape": shapes,
    }
    lines = [f"{len(found)} keys {kind}: {shorten_list(found)}" for kind, found in faults.items() if found]
    if lines:
        raise CheckpointError("\n  ".join([f"{source}: the weights do not fit this model", *lines]))


def shorten_list(items: list[str]) -> str:
    """The first few items, and the number of further ones."""
    more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
