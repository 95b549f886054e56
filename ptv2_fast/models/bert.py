"""BERT, RoBERTa, XLM-R and ELECTRA: post-norm encoders, whose layers project a prompt as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.models.projection import Projection, linear_projection
from ptv2_fast.models.rows import gather_rows, scatter_rows
from ptv2_fast.models.view import view_of


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers in order."""
    return backbone.encoder.layer


def normed(backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
    """What a layer's projections read: post-norm layers take their input as it is."""
    return states


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value projection of one layer."""
    attention = backbone.encoder.layer[layer].attention.self
    return linear_projection(attention.key), linear_projection(attention.value)


def finished(backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
    """Keys (P, H, d) as attention reads them: BERT's projection is all there is."""
    return keys


def as_they_are(backbone: PreTrainedModel, layers: Sequence[int], states: Tensor) -> Tensor:
    """`normed` and `finished` of several layers."""
    return states


def roberta_first_position(backbone: PreTrainedModel) -> int:
    """RoBERTa counts positions from padding_idx + 1."""
    return backbone.embeddings.padding_idx + 1


def shallow_view(backbone: PreTrainedModel, prompts: Tensor, encoder: str = "encoder") -> PreTrainedModel:
    """A view of the backbone in which virtual tokens evolve in front of every row's text.

    Text cannot be computed without the virtual tokens nor they without the text, so the rows of
    both live in one (B, P + N, D) buffer that the embedding step writes once; what follows the last
    layer sees the text only.

    Args:
        backbone: BertModel, RobertaModel or any model that embeds by `embeddings` and then runs `encoder`.
        prompts: (P, E) embeddings of the virtual tokens, at positions 0..P-1.
        encoder: the name of what runs the layers.

    Returns:
        A module called like the backbone.
    """
    length = prompts.shape[0]

    def encode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return of_the_text(original(*args, **kwargs), length)

    def run(original: Callable[..., Any], *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return original(*args, attention_mask=visible_prompts(attention_mask, length), **kwargs)

    children = {
        "embeddings": behind_prompts(backbone.embeddings, prompts),
        encoder: view_of(getattr(backbone, encoder), forward=encode),
    }
    return view_of(view_of(backbone, children=children), forward=run)


def behind_prompts(embeddings: nn.Module, prompts: Tensor) -> nn.Module:
    """A view of an embedding module that embeds (P, E) virtual tokens in front of every row's text: (B, P + N, E)."""
    length = prompts.shape[0]

    def embed(
        original: Callable[..., Any],
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if mask is not None:
            kwargs["mask"] = mask[:, length:]
        # (B, N, E)
        text = original(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs)
        # Without position ids the embedding module counts from its own first position.
        virtual = original(input_ids=None, inputs_embeds=prompts[None].to(text.dtype))  # (1, P, E)
        return torch.cat([virtual.expand(text.shape[0], -1, -1), text], dim=1)

    return view_of(embeddings, forward=embed)


def of_the_text(output: Any, length: int) -> Any:
    """A model's output with the states of the text alone, behind `length` virtual tokens."""
    output.last_hidden_state = output.last_hidden_state[:, length:]
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(states[:, length:] for states in output.hidden_states)
    return output


@overload
def visible_prompts(attention_mask: Tensor, length: int) -> Tensor: ...
@overload
def visible_prompts(attention_mask: Tensor | None, length: int) -> Tensor | None: ...
def visible_prompts(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """(B, P + N): the mask of a text (B, N) with P virtual tokens in front."""
    return None if attention_mask is None else torch.nn.functional.pad(attention_mask, (length, 0), value=1)


def read_rows(layer: nn.Module, index: Tensor) -> nn.Module:
    """A view of a layer that computes, from its attention's output on, the tokens `index` (R,) of (B, N) alone."""

    def project(original: Callable[..., Any], attended: Tensor, residual: Tensor) -> Any:
        return original(gather_rows(attended, index), gather_rows(residual, index))

    def run(original: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return scatter_rows(original(hidden, *args, **kwargs), index, hidden)

    attention = layer.attention
    attention = view_of(attention, children={"output": view_of(attention.output, forward=project)})
    return view_of(view_of(layer, children={"attention": attention}), forward=run)
