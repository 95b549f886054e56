"""Rotary positions of a prompt's keys: the tokens right before the text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Kinds whose frequencies change with the length of the text: a prompt's keys, turned once, cannot follow.
_BY_LENGTH = ("dynamic", "longrope")


def tables_before_text(backbone: PreTrainedModel, keys: Tensor, *layer_type: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines (P, 1, rotary size) of positions -P..-1, as the model makes them for keys (P, Hkv, d).

    Rotary attention sees differences of positions only: with the text at 0.. that is where the literal form has them.

    Args:
        layer_type: what the family's rotary module asks for besides, where layers of different kinds differ.
    """
    positions = torch.arange(-keys.shape[0], 0, device=keys.device)[None, :]
    cos, sin = backbone.rotary_emb(keys, positions, *layer_type)  # (1, P, rotary size)
    return cos[0, :, None, :], sin[0, :, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels of x (..., P, Hkv, d), with their two halves as the pairs.

    Args:
        cos, sin: (P, 1, rotary size), as most models' rotary modules give them; where they are wider than x, the
            products are taken in their dtype.

    Returns:
        A tensor of the shape and dtype of x.
    """
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels of x (..., P, Hkv, d), with each two neighbours as a pair.

    Args:
        cos, sin: (P, 1, pairs).

    Returns:
        A tensor of the shape and dtype of x.
    """
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned[..., ::2], turned[..., 1::2]
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def in_float32(x: Tensor) -> Tensor:
    """x in float32 or better: some models leave their own dtype to rotate."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def max_rotary_length(backbone: PreTrainedModel) -> int | None:
    """The text length beyond which the model turns its keys by other frequencies; None where it never does."""
    rules = getattr(backbone.config, "rope_parameters", None) or {}
    per_layer = [rule for rule in rules.values() if isinstance(rule, dict) and "rope_type" in rule]
    limits = [
        rule.get("original_max_position_embeddings") or backbone.config.max_position_embeddings
        for rule in per_layer or [rules]
        if rule.get("rope_type") in _BY_LENGTH
    ]
    return min(limits, default=None)
