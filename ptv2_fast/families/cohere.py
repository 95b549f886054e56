"""Cohere's Command R and Command R7B: Llama's shape with one norm for attention and MLP, neighbours as rotary pairs."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone import rotary
from ptv2_fast.families.llama import Llama


class Cohere(Llama):
    def for_key_norm(self, backbone: PreTrainedModel, keys: Tensor) -> Tensor:
        """Keys (..., R * Hkv, d) as (..., R, Hkv, d): the norm has a weight for every head."""
        return keys.unflatten(-2, (-1, backbone.config.num_key_value_heads))

    def rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys (..., P, Hkv, d) turned in float32 or better; the tables have each pair's angle twice in a row."""
        return rotary.rotate_neighbours(rotary.in_float32(keys), cos[..., ::2], sin[..., ::2]).to(keys.dtype)


class Cohere2(Cohere):
    def knows_positions(self, attention: nn.Module) -> bool:
        """Whether an attention module turns its keys: those with a window do."""
        return attention.sliding_window is not None
