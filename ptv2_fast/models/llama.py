"""Llama and its kin (Qwen3): pre-norm decoders with rotary positions, grouped heads, sometimes key norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.models.projection import Projection, linear_projection


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers in order."""
    return backbone.layers


def normed(backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
    """What a layer's projections read: its input after the input norm."""
    return backbone.layers[layer].input_layernorm(states)


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value projection of one layer."""
    attention = backbone.layers[layer].self_attn
    return linear_projection(attention.k_proj), linear_projection(attention.v_proj)


def finished(backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
    """Keys (P, Hkv, d) as attention reads them: normalised where the family does that, then rotated.

    Rotary attention sees differences of positions only: with the text at 0.. the prompt stands at -P..-1.
    """
    attention = backbone.layers[layer].self_attn
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    positions = torch.arange(-keys.shape[0], 0, device=keys.device)[None, :]
    cos, sin = backbone.rotary_emb(keys, positions)  # (1, P, d)
    return _rotate(keys, cos[0, :, None, :], sin[0, :, None, :])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding with the two halves of a head as the pairs; x (P, Hkv, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
