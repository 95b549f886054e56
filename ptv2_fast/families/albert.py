"""ALBERT: one layer, or a few, run again and again; each repetition has a prompt of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.backbone.view import view_of, with_modules


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The groups of shared weights; in an indexed view the repetitions in order."""
    return backbone.encoder.albert_layer_groups


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value projection of one repetition."""
    group = backbone.encoder.albert_layer_groups[_group_of(backbone, layer)]
    attention = group.albert_layers[0].attention
    return linear_projection(attention.key), linear_projection(attention.value)


def with_layer_index(backbone: PreTrainedModel) -> PreTrainedModel:
    """A view of the backbone with one layer group for every repetition, whose attention knows which one it is.

    The encoder picks group i * groups // repetitions for repetition i: with as many groups as repetitions, group i.
    """
    encoder = backbone.encoder
    groups, config = encoder.albert_layer_groups, copy.copy(encoder.config)
    repetitions = {}
    for index in range(config.num_hidden_layers):
        group = groups[int(index / (config.num_hidden_layers / config.num_hidden_groups))]
        attention = view_of(group.albert_layers[0].attention, attributes={"layer_idx": index})
        repetitions[str(index)] = with_modules(group, {"albert_layers.0.attention": attention})
    config.num_hidden_groups = config.num_hidden_layers
    groups = view_of(groups, children=repetitions)
    children = {"encoder": view_of(encoder, children={"albert_layer_groups": groups}, attributes={"config": config})}
    if backbone.pooler is not None:
        children |= _pooler(backbone)
    return view_of(backbone, children=children)


def check(backbone: PreTrainedModel) -> None:
    """Refuse groups of several layers: a repetition would need several prompts.

    Raises:
        ValueError: the configuration has them.
    """
    if backbone.config.inner_group_num != 1:
        raise ValueError(f"base must have inner_group_num 1; got {backbone.config.inner_group_num}")


def _pooler(backbone: nn.Module) -> dict[str, nn.Module]:
    """The pooler with its activation inside, for the first state (B, D) of each row or for all of them (B, N, D)."""
    activation = backbone.pooler_activation

    def read(original: Callable[..., Any], states: Tensor) -> Tensor:
        return activation(original(states if states.dim() == 2 else states[:, 0]))

    return {"pooler": view_of(backbone.pooler, forward=read), "pooler_activation": nn.Identity()}


def _group_of(backbone: PreTrainedModel, layer: int) -> int:
    config = backbone.config
    return int(layer / (config.num_hidden_layers / config.num_hidden_groups))
