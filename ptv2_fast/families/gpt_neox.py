"""GPT-NeoX (Pythia): pre-norm decoder with a projection fused head by head and rotary positions on part of a head."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone import rotary
from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.families.family import Family


class GptNeox(Family):
    causal = True
    rotary = True
    skips_unread_tokens = True
    norm_path = "input_layernorm"
    attention_path = "attention"

    def projections(self, backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
        """The key and the value part of one layer's fused projection, which maps to [q k v] of each head in turn."""
        attention = backbone.layers[layer].attention
        fused = linear_projection(attention.query_key_value)
        by_head = (backbone.config.num_attention_heads, 3, attention.head_size)
        return fused.part(by_head, 1), fused.part(by_head, 2)

    def finish_keys(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
        """Keys (P, H, d) as attention reads them: the first channels of each head rotated."""
        return self.rotate(keys, *rotary.tables_before_text(backbone, keys))
