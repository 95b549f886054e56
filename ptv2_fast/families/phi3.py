"""Phi-3: Llama's shape with one fused projection for queries, keys and values."""

from __future__ import annotations

from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.families.llama import Llama


class Phi3(Llama):
    def projections(self, backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
        """The key and the value part of one layer's fused projection, which maps to [q | k | v]."""
        attention, config = backbone.layers[layer].self_attn, backbone.config
        fused = linear_projection(attention.qkv_proj)
        first = config.num_attention_heads * attention.head_dim
        width = config.num_key_value_heads * attention.head_dim
        return fused.rows(first, first + width), fused.rows(first + width, first + 2 * width)
