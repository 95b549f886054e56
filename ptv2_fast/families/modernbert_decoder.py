"""ModernBERT-decoder (Ettin): ModernBERT made causal, with windows, and rotary tables by kind of layer."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone import rotary
from ptv2_fast.families.family import Family


class ModernBertDecoder(Family):
    causal = True
    rotary = True
    skips_unread_tokens = True
    linear_head = False
    # The first layer's is no norm.
    norm_path = "attn_norm"
    attention_path = "attn"

    def finish_keys(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
        """Keys (P, H, d) as attention reads them: rotated as the layer's kind is."""
        return self.rotate(keys, *rotary.tables_before_text(backbone, keys, backbone.config.layer_types[layer]))

    def rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys (P, H, d) turned in float32 or better."""
        return rotary.rotate(rotary.in_float32(keys), cos, sin).to(keys.dtype)
