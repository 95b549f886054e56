"""GPT-2: pre-norm decoder with one fused projection and learned positions."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ptv2_fast.models.projection import Projection


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks in order."""
    return backbone.h


def normed(backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
    """What a block's projections read: its input after the first norm."""
    return backbone.h[layer].ln_1(states)


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value part of one block's fused projection.

    Raises:
        ValueError: the projection is not transformers' Conv1D.
    """
    attention = backbone.h[layer].attn
    fused, width = attention.c_attn, attention.split_size
    if type(fused) is not Conv1D:
        raise ValueError(f"base must project keys and values by Conv1D; got {type(fused).__name__}")
    # It maps to [q | k | v], and Conv1D stores its weight as (in, out).
    keys, values = (slice(i * width, (i + 1) * width) for i in (1, 2))
    return (
        Projection(fused.weight[:, keys].T, fused.bias[keys]),
        Projection(fused.weight[:, values].T, fused.bias[values]),
    )


def finished(backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
    """Keys (P, H, d) as attention reads them: GPT-2's projection is all there is."""
    return keys
