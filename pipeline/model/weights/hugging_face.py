"""Converts the tensor names of Hugging Face's `DeformableDetrForObjectDetection` to the published layout.

Files of every transformers release are supported. v4 names the two layers of a feed-forward `fc1` and `fc2`; v5 names
them `mlp.fc1` and `mlp.fc2` in memory, with v4's names on disk. Shared heads are stored once or under each name. The
backbone must be timm's ResNet, as in the converted models (`use_timm_backbone`, the default). Other models are a
CheckpointError.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import CheckpointError

# In this order: a rule may produce a name that a later rule changes.
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^model\.backbone\.(conv_encoder\.)?model\.", "backbone.0.body."),
        (r"^model\.(input_proj\.)", r"\1"),
        (r"^model\.query_position_embeddings\.", "query_embed."),
        (r"^model\.", "transformer."),
        (r"\.(mlp\.)?fc([12])\.", r".linear\2."),
        (r"\.encoder_attn\.", ".cross_attn."),
        (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
        # the published decoder numbers its norms from the cross-attention
        (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
        (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
        (r"(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm1."),
        (r"(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
        (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    )
)
_PROJECTION = re.compile(r"(.*\.self_attn\.)([qkv])_proj\.(weight|bias)")
_DECODER = "transformer.decoder."


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to all of their names in the published layout and join q, k and v projections.

    A tensor without a counterpart keeps its name, or a partly converted one, for the report of the loader.

    Raises:
        CheckpointError: the file is of another architecture, or names of one tensor hold different values.
    """
    if not any(".sampling_offsets." in key for key in state_dict):
        raise CheckpointError("not of DeformableDetrForObjectDetection, the only Hugging Face model read here")
    tensors: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        parts = _PROJECTION.fullmatch(key)
        if parts:
            projections.setdefault(_rename(f"{parts[1]}in_proj_{parts[3]}"), {})[parts[2]] = tensor
        else:
            tensors[_rename(key)] = tensor
    for key, found in projections.items():
        if len(found) == len("qkv"):
            tensors[key] = torch.cat([found[which] for which in "qkv"])
    return tensors | _heads(tensors)


def _heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prediction heads of every layer, under all of their names."""
    two_stage = "transformer.enc_output.weight" in tensors
    layers = len({match[1] for key in tensors if (match := re.match(r"transformer\.decoder\.layers\.(\d+)\.", key))})
    heads: dict[str, Tensor] = {}
    for part, own_names in (("class_embed.", two_stage), ("bbox_embed.", True)):
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(_DECODER)
            if name.startswith(part) and not torch.equal(found.setdefault(name, tensor), tensor):
                raise CheckpointError(f"{name} and {_DECODER}{name} are one tensor, but differ in this file")
        first = {name: tensor for name, tensor in found.items() if name.startswith(f"{part}0.")}
        if len(first) == len(found):  # stored once for all layers
            found = {
                f"{part}{layer}.{name.removeprefix(f'{part}0.')}": tensor
                for name, tensor in first.items()
                for layer in range(layers + two_stage)
            }
        shared = all(torch.equal(tensor, first[re.sub(r"\d+", "0", name, count=1)]) for name, tensor in found.items())
        heads |= found
        if own_names and (two_stage or not shared):  # the published decoder of `refine` also holds them
            heads |= {_DECODER + name: tensor for name, tensor in found.items()}
    return heads


def _rename(key: str) -> str:
    for pattern, name in _RENAMES:
        key = pattern.sub(name, key)
    return key
