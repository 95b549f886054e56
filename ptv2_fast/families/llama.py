"""Llama and its kin: pre-norm decoders with rotary positions, grouped heads, sometimes key norms.

Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, SmolLM3: their windows, scales and experts are the layers' own business and
reach attention without the package's help.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone import rotary
from ptv2_fast.backbone.locate import part_at
from ptv2_fast.backbone.norms import normed_together
from ptv2_fast.families.family import Family


class Llama(Family):
    causal = True
    rotary = True
    skips_unread_tokens = True
    norm_path = "input_layernorm"

    def finish_keys(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
        """Keys (P, Hkv, d) as attention reads them: normalised where the family does that, then rotated.

        Some of SmolLM3's layers know no positions at all.
        """
        attention = part_at(backbone, self.path_of_attention(backbone, layer))
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        return rotary.before_text(backbone, keys) if getattr(attention, "use_rope", True) else keys

    def finish_all_keys(self, backbone: PreTrainedModel, layers: Sequence[int], keys: Tensor) -> Tensor | None:
        """`finish_keys` of several layers' keys (L, P, Hkv, d)."""
        attentions = [part_at(backbone, self.path_of_attention(backbone, layer)) for layer in layers]
        if not all(attention.__dict__.get("use_rope", True) for attention in attentions):
            return None
        finished: Tensor | None = keys
        if hasattr(attentions[0], "k_norm"):
            finished = normed_together([attention.k_norm for attention in attentions], keys)
        return None if finished is None else rotary.rotate(finished, *rotary.tables_before_text(backbone, finished[0]))
