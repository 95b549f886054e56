"""OPT: decoder with learned positions; the smallest and the 350m model norm before and after their attention."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.families.family import Family


class Opt(Family):
    causal = True
    layers_path = "decoder.layers"

    def check(self, backbone: PreTrainedModel) -> None:
        """Refuse layers that are left out at random: a shallow prompt's pass would lack their keys.

        Raises:
            ValueError: the configuration has a layerdrop.
        """
        if backbone.config.layerdrop:
            raise ValueError(f"base must have layerdrop 0; got {backbone.config.layerdrop}")

    def attention_input(self, backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
        """What a layer's projections read: its input after the first norm, or as it is in post-norm models."""
        module = backbone.decoder.layers[layer]
        return module.self_attn_layer_norm(states) if module.do_layer_norm_before else states
