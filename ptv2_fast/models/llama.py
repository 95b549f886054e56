"""Llama and its kin (Qwen3): pre-norm decoders with rotary positions, grouped heads, sometimes key norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers in order."""
    return backbone.layers


def project(backbone: PreTrainedModel, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of prompt states (P, D) at one layer, each (Hkv, P, d).

    Rotary attention sees differences of positions only: with the text at 0.. the prompt stands at
        -P..-1.
    """
    block = backbone.layers[layer]
    attention = block.self_attn
    normed = block.input_layernorm(states)
    split = (*states.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(normed).view(split)  # (P, Hkv, d)
    values = attention.v_proj(normed).view(split)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    length = states.shape[0]
    positions = torch.arange(-length, 0, device=states.device)[None, :]
    cos, sin = backbone.rotary_emb(states, positions)  # (1, P, d)
    keys = _rotate(keys, cos[0, :, None, :], sin[0, :, None, :])
    return keys.transpose(0, 1), values.transpose(0, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding with the two halves of a head as the pairs; x (P, Hkv, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
