"""One-stage Deformable DETR written down once more, plainly, over a checkpoint in the published layout.

The independent reference of variants for which no recorded numbers are at hand: single-scale, DC5, ResNet-101, K = 1.
It shares no code with the pipeline: torchvision's network, grid_sample, every index spelled out. test_published.py
first holds it against the recorded outputs of the authors' multi-scale model.
"""

import math
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # as everyone writes it

from support import golden_recipe

DIM, HEADS, LAYERS = 256, 8, 6


@dataclass(frozen=True)
class Variant:
    """What the published flags change."""

    network: str = "resnet50"
    dilation: bool = False
    levels: int = 4
    points: int = 4


def shapes(variant: Variant) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the variant's checkpoint, from those recorded of the multi-scale one."""
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in golden_recipe.load("ms")[0]["keys"].items():
        parts = key.split(".")
        if parts[0] == "input_proj" and int(parts[1]) >= variant.levels:
            continue
        if parts[-2] == "sampling_offsets":
            shape = [HEADS * variant.levels * variant.points * 2, *shape[1:]]
        if parts[-2] == "attention_weights":
            shape = [HEADS * variant.levels * variant.points, *shape[1:]]
        if parts[-1] == "level_embed":
            shape = [variant.levels, DIM]
        if variant.levels == 1 and key == "input_proj.0.0.weight":
            shape = [DIM, 2048, 1, 1]
        found[key] = tuple(shape)
        if variant.network == "resnet101" and "layer3.5." in key:
            found |= {key.replace("layer3.5.", f"layer3.{block}."): tuple(shape) for block in range(6, 23)}
    return found


class Published:
    """The model; `tensors` are float32 and may take gradients, aliases are one tensor."""

    def __init__(self, variant: Variant, tensors: dict[str, Tensor]) -> None:
        self.variant = variant
        self.tensors = tensors

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (DIM,), self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def __call__(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and boxes_cxcywh of the last decoder layer."""
        levels = self.features(images)
        masks = [F.interpolate(mask[None].float(), size=x.shape[-2:])[0].bool() for x in levels]
        sizes = [(x.shape[2], x.shape[3]) for x in levels]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1)
        position = torch.cat([sine(m) + self.tensors["transformer.level_embed"][i] for i, m in enumerate(masks)], 1)
        padding = torch.cat([m.flatten(1) for m in masks], 1)
        ratios = torch.stack(
            [torch.stack([(~m[:, 0]).sum(1) / m.shape[2], (~m[:, :, 0]).sum(1) / m.shape[1]], -1) for m in masks], 1
        )  # [N, L, (x, y)]
        places = []
        for level, (height, width) in enumerate(sizes):
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            grid = torch.stack([x.flatten(), y.flatten()], -1)
            places.append(grid / (ratios[:, level, None] * torch.tensor([width, height])))
        centres = torch.cat(places, 1)[:, :, None] * ratios[:, None]
        for layer in range(LAYERS):
            name = f"transformer.encoder.layers.{layer}"
            attended = self.attend(f"{name}.self_attn", tokens + position, centres, tokens, padding, sizes)
            tokens = self.norm(f"{name}.norm1", tokens + attended)
            tokens = self.norm(f"{name}.norm2", tokens + self.ffn(name, tokens))
        query_pos, target = (x.expand(len(images), -1, -1) for x in self.tensors["query_embed.weight"].split(DIM, 1))
        reference = self.linear("transformer.reference_points", query_pos).sigmoid()
        for layer in range(LAYERS):
            name = f"transformer.decoder.layers.{layer}"
            target = self.norm(f"{name}.norm2", target + self.self_attention(f"{name}.self_attn", target, query_pos))
            where = reference[:, :, None] * ratios[:, None]
            attended = self.attend(f"{name}.cross_attn", target + query_pos, where, tokens, padding, sizes)
            target = self.norm(f"{name}.norm1", target + attended)
            target = self.norm(f"{name}.norm3", target + self.ffn(name, target))
        box = target
        for step in range(3):
            box = self.linear(f"bbox_embed.5.layers.{step}", box)
            box = box.relu() if step < 2 else box
        shift = torch.log(reference.clamp(min=1e-5) / (1 - reference).clamp(min=1e-5))
        return self.linear("class_embed.5", target), torch.cat([box[..., :2] + shift, box[..., 2:]], -1).sigmoid()

    def features(self, images: Tensor) -> list[Tensor]:
        body = torchvision.models.get_model(
            self.variant.network,
            norm_layer=torchvision.ops.FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, self.variant.dilation],
        )
        prefix = "backbone.0.body."
        own = {key.removeprefix(prefix): x for key, x in self.tensors.items() if key.startswith(prefix)}
        maps: list[Tensor] = []
        for stage in (body.layer2, body.layer3, body.layer4):
            stage.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
        torch.func.functional_call(body, own, (images,))
        maps = maps if self.variant.levels > 1 else maps[-1:]
        found = []
        for level in range(self.variant.levels):
            first = level < len(maps)
            source = maps[level] if first else (maps[-1] if level == len(maps) else found[-1])
            weight, bias = (self.tensors[f"input_proj.{level}.0.{name}"] for name in ("weight", "bias"))
            x = F.conv2d(source, weight, bias) if first else F.conv2d(source, weight, bias, stride=2, padding=1)
            scale, shift = (self.tensors[f"input_proj.{level}.1.{name}"] for name in ("weight", "bias"))
            found.append(F.group_norm(x, 32, scale, shift))
        return found

    def ffn(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.linear2", self.linear(f"{name}.linear1", x).relu())

    def self_attention(self, name: str, target: Tensor, position: Tensor) -> Tensor:
        weight, bias = self.tensors[f"{name}.in_proj_weight"], self.tensors[f"{name}.in_proj_bias"]
        inputs = (target + position, target + position, target)
        q, k, v = (
            F.linear(x, w, b).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for x, w, b in zip(inputs, weight.chunk(3), bias.chunk(3), strict=True)
        )
        shares = (q @ k.transpose(2, 3) / math.sqrt(DIM // HEADS)).softmax(-1)
        return self.linear(f"{name}.out_proj", (shares @ v).transpose(1, 2).flatten(2))

    def attend(
        self,
        name: str,
        query: Tensor,
        reference: Tensor,
        tokens: Tensor,
        padding: Tensor,
        sizes: list[tuple[int, int]],
    ) -> Tensor:
        batch, queries, _ = query.shape
        levels, points = self.variant.levels, self.variant.points
        value = self.linear(f"{name}.value_proj", tokens) * ~padding[..., None]
        offsets = self.linear(f"{name}.sampling_offsets", query).view(batch, queries, HEADS, levels, points, 2)
        weights = self.linear(f"{name}.attention_weights", query).view(batch, queries, HEADS, -1).softmax(-1)
        weights = weights.view(batch, queries, HEADS, levels, points)
        total = torch.zeros(batch, HEADS, DIM // HEADS, queries)
        for level, pixels in enumerate(value.split([h * w for h, w in sizes], 1)):
            height, width = sizes[level]
            places = reference[:, :, None, None, level] + offsets[:, :, :, level] / torch.tensor([width, height])
            for head in range(HEADS):
                channels = pixels[:, :, head * 32 : head * 32 + 32].transpose(1, 2).reshape(batch, 32, height, width)
                sampled = F.grid_sample(channels, 2 * places[:, :, head] - 1, align_corners=False)  # [N, 32, Q, P]
                total[:, head] += (sampled * weights[:, None, :, head, level]).sum(-1)
        return self.linear(f"{name}.output_proj", total.flatten(1, 2).transpose(1, 2))


def sine(mask: Tensor) -> Tensor:
    """[N, H * W, 256]: y, then x; pixels count from their centre."""
    valid = (~mask).float()
    halves = []
    for axis in (1, 2):
        along = valid.cumsum(axis)
        last = along.select(axis, -1).unsqueeze(axis)
        angle = (along - 0.5) / (last + 1e-6) * 2 * math.pi
        for feature in range(128):
            wave = angle / 10000 ** (2 * (feature // 2) / 128)
            halves.append(wave.cos() if feature % 2 else wave.sin())
    return torch.stack(halves, -1).flatten(1, 2)
