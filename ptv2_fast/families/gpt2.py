"""GPT-2: pre-norm decoder with one fused projection and learned positions."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection, linear_projection


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks in order."""
    return backbone.h


def attention_input(backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
    """What a block's projections read: its input after the first norm."""
    return backbone.h[layer].ln_1(states)


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value part of one block's fused projection, which maps to [q | k | v]."""
    attention = backbone.h[layer].attn
    fused, width = linear_projection(attention.c_attn), attention.split_size
    return fused.rows(width, 2 * width), fused.rows(2 * width, 3 * width)


def finish_keys(backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
    """Keys (P, H, d) as attention reads them: GPT-2's projection is all there is."""
    return keys
