"""OLMo-2: Llama's shape with its norms behind attention and behind the MLP, and key norms over all heads together."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.families.llama import Llama


class Olmo2(Llama):
    norm_path = None

    def for_key_norm(self, backbone: PreTrainedModel, keys: Tensor) -> Tensor:
        """Keys (..., R * Hkv, d) token by token, (..., R, Hkv * d)."""
        return keys.unflatten(-2, (-1, backbone.config.num_key_value_heads)).flatten(-2)
