"""Gemma 2 and 3, the text models: Llama's shape; in Gemma 3 layers with a window have rotary tables of their own."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone import rotary
from ptv2_fast.families.llama import Llama


class Gemma2(Llama):
    def check(self, backbone: PreTrainedModel) -> None:
        """Refuse what is no decoder.

        Raises:
            ValueError: the configuration lets text see what stands after it.
        """
        if getattr(backbone.config, "use_bidirectional_attention", False):
            raise ValueError("base must be a decoder; got Gemma with use_bidirectional_attention=True")


class Gemma3(Gemma2):
    def finish_keys(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
        """Keys (P, Hkv, d) as attention reads them: normalised, then rotated as the layer's kind is."""
        keys = backbone.layers[layer].self_attn.k_norm(keys)
        return self.rotate(keys, *rotary.tables_before_text(backbone, keys, backbone.config.layer_types[layer]))
