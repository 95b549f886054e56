"""ALBERT: one layer, or a few, run again and again; each repetition has a prompt of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.view import view_of, with_modules
from ptv2_fast.families.bert import Bert


class Albert(Bert):
    """`layers` are the groups of shared weights; in a view that knows the layers, the repetitions in order."""

    skips_unread_tokens = False
    layer_index = "layer_idx"
    layers_path = "encoder.albert_layer_groups"
    attention_path = "albert_layers.0.attention"

    def check(self, backbone: PreTrainedModel) -> None:
        """Refuse groups of several layers: a repetition would need several prompts.

        Raises:
            ValueError: the configuration has them.
        """
        if backbone.config.inner_group_num != 1:
            raise ValueError(f"base must have inner_group_num 1; got {backbone.config.inner_group_num}")

    def num_attentions(self, backbone: PreTrainedModel) -> int:
        """The number of repetitions."""
        repetitions: int = backbone.config.num_hidden_layers
        return repetitions

    def path_of_attention(self, backbone: PreTrainedModel, layer: int) -> str:
        """Where the attention is that a repetition shares with others."""
        config = backbone.config
        group = int(layer / (config.num_hidden_layers / config.num_hidden_groups))
        return super().path_of_attention(backbone, group)

    def with_layer_index(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """A view of the backbone with one layer group for every repetition, whose attention knows which one it is.

        The encoder picks group i * groups // repetitions for repetition i: with as many groups as repetitions, group i.
        """
        encoder = backbone.encoder
        groups, config = encoder.albert_layer_groups, copy.copy(encoder.config)
        repetitions = {}
        for index in range(config.num_hidden_layers):
            group = groups[int(index / (config.num_hidden_layers / config.num_hidden_groups))]
            attention = view_of(group.get_submodule(self.attention_path), attributes={self.layer_index: index})
            repetitions[str(index)] = with_modules(group, {self.attention_path: attention})
        config.num_hidden_groups = config.num_hidden_layers
        groups = view_of(groups, children=repetitions)
        children = {
            "encoder": view_of(encoder, children={"albert_layer_groups": groups}, attributes={"config": config})
        }
        if backbone.pooler is not None:
            children |= _pooler(backbone)
        return view_of(backbone, children=children)


def _pooler(backbone: nn.Module) -> dict[str, nn.Module]:
    """The pooler with its activation inside, for the first state (B, D) of each row or for all of them (B, N, D)."""
    activation = backbone.pooler_activation

    def read(original: Callable[..., Any], states: Tensor) -> Tensor:
        return activation(original(states if states.dim() == 2 else states[:, 0]))

    return {"pooler": view_of(backbone.pooler, forward=read), "pooler_activation": nn.Identity()}
