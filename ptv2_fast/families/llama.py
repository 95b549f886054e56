"""Llama and its kin: pre-norm decoders with rotary positions, grouped heads, sometimes key norms.

Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, SmolLM3: their windows, scales and experts are the layers' own business and
reach attention without the package's help.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone import rotary
from ptv2_fast.backbone.locate import part_at
from ptv2_fast.backbone.norms import normed_together
from ptv2_fast.families.family import Family


class Llama(Family):
    causal = True
    rotary = True
    skips_unread_tokens = True
    norm_path: str | None = "input_layernorm"

    def for_key_norm(self, backbone: PreTrainedModel, keys: Tensor) -> Tensor:
        """Keys (..., R * Hkv, d) as the layers' key norm takes them: the numbers in their order, in its shape."""
        return keys

    def knows_positions(self, attention: nn.Module) -> bool:
        """Whether an attention module turns its keys: some of SmolLM3's do not."""
        return bool(attention.__dict__.get("use_rope", True))

    def finish_keys(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
        """Keys (P, Hkv, d) as attention reads them: normalised where the family does that, then rotated."""
        attention = part_at(backbone, self.path_of_attention(backbone, layer))
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(self.for_key_norm(backbone, keys)).reshape(keys.shape)
        if not self.knows_positions(attention):
            return keys
        return self.rotate(keys, *rotary.tables_before_text(backbone, keys))

    def finish_all_keys(self, backbone: PreTrainedModel, layers: Sequence[int], keys: Tensor) -> Tensor | None:
        """`finish_keys` of several layers' keys (L, P, Hkv, d)."""
        attentions = [part_at(backbone, self.path_of_attention(backbone, layer)) for layer in layers]
        if not all(map(self.knows_positions, attentions)):
            return None
        if hasattr(attentions[0], "k_norm"):
            norms = [attention.k_norm for attention in attentions]
            normed = normed_together(norms, self.for_key_norm(backbone, keys))
            if normed is None:
                return None
            keys = normed.reshape(keys.shape)
        return self.rotate(keys, *rotary.tables_before_text(backbone, keys[0]))
