"""Multi-scale deformable attention as a module: the operator and its projections.

Under autocast value, offsets and logits are bf16, but coordinates are not: the operator adds offsets to the float32
references. Source: arXiv 2010.04159, section 4.1 and equation 3. Shapes that do not match are an OpError.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.model.ops.sampling import ms_deform_attn_fused
from pipeline.model.position import Pyramid


class MSDeformAttn(nn.Module):
    """Each query samples `points` locations per head and level around its reference; the weights are learned."""

    def __init__(self, hidden_dim: int, heads: int, levels: int, points: int, impl: str = "auto") -> None:
        super().__init__()
        self.heads, self.levels, self.points, self.impl = heads, levels, points, impl
        self.sampling_offsets = nn.Linear(hidden_dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(hidden_dim, heads * levels * points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point p of head h starts p + 1 pixels from the reference in direction 2 pi h / heads, on a square ring."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ring = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ring = ring / ring.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.points + 1)
        offsets = (ring[:, None, None] * steps[:, None]).expand(self.heads, self.levels, self.points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, references: Tensor, tokens: Tensor, pyramid: Pyramid) -> Tensor:
        """Attend from queries to the flattened levels.

        Args:
            query: [N, Q, hidden_dim].
            references: float32 [N, Q, L, 2] points or [N, Q, L, 4] boxes_cxcywh, relative to each padded level.
            tokens: [N, S, hidden_dim]; padding is set to zero after the projection.
            pyramid: shapes and padding of the levels.

        Returns:
            [N, Q, hidden_dim].
        """
        return self.attend(query, references, mask_padding(self.value_proj(tokens), pyramid), pyramid)

    def attend(self, query: Tensor, references: Tensor, value: Tensor, pyramid: Pyramid) -> Tensor:
        """As `forward`, from the projected tokens [N, S, hidden_dim], which are zero in the padding."""
        batch, queries, width = query.shape
        grid = (batch, queries, self.heads, self.levels, self.points)
        offsets, logits = self.sampling_offsets(query).view(*grid, 2), self.attention_weights(query).view(grid)
        value = value.view(batch, -1, self.heads, width // self.heads)
        sampled = ms_deform_attn_fused(value, pyramid.shapes, references, offsets, logits, self.impl)
        return self.output_proj(sampled)


def mask_padding(value: Tensor, pyramid: Pyramid) -> Tensor:
    """The projected tokens [..., N, S, hidden_dim] with zeros in the padding."""
    return value.masked_fill(pyramid.padding[..., None], 0)


def project_values(layers: Sequence[MSDeformAttn], tokens: Tensor, pyramid: Pyramid) -> tuple[Tensor, ...]:
    """The values [N, S, hidden_dim] of several layers that attend to the same tokens, in one product; see `attend`."""
    weight = torch.stack([layer.value_proj.weight for layer in layers])  # [L, out, in]
    bias = torch.stack([layer.value_proj.bias for layer in layers])
    rows = tokens.flatten(0, 1).expand(len(layers), -1, -1)
    value = torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2)).unflatten(1, tokens.shape[:2])
    return mask_padding(value, pyramid).unbind(0)
