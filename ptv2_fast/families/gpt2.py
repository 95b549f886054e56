"""GPT-2: pre-norm decoder with one fused projection and learned positions."""

from __future__ import annotations

from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.families.family import Family


class Gpt2(Family):
    causal = True
    skips_unread_tokens = True
    layers_path = "h"
    norm_path = "ln_1"
    attention_path = "attn"

    def projections(self, backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
        """The key and the value part of one block's fused projection, which maps to [q | k | v]."""
        attention = backbone.h[layer].attn
        fused, width = linear_projection(attention.c_attn), attention.split_size
        return fused.rows(width, 2 * width), fused.rows(2 * width, 3 * width)
