"""GPT-2: pre-norm decoder with one fused projection and learned positions."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks in order."""
    return backbone.h


def project(backbone: PreTrainedModel, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of prompt states (P, D) at one block, each (H, P, d)."""
    block = backbone.h[layer]
    attention = block.attn
    width = attention.split_size
    # c_attn maps to [q | k | v]; the query third is not needed. Its weight is stored (in, out).
    weight, bias = attention.c_attn.weight[:, width:], attention.c_attn.bias[width:]
    keys_values = block.ln_1(states) @ weight.to(states.dtype) + bias.to(states.dtype)
    keys, values = keys_values.split(width, dim=-1)
    split = (*states.shape[:-1], -1, attention.head_dim)
    return keys.view(split).transpose(0, 1), values.view(split).transpose(0, 1)
