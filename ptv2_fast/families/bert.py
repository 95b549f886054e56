"""BERT, RoBERTa, XLM-R and ELECTRA: post-norm encoders, whose layers project a prompt as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.backbone.tokens import gather_tokens, scatter_tokens
from ptv2_fast.backbone.view import view_of
from ptv2_fast.backbone.virtual_tokens import behind_prompts, of_the_text, visible_prompts


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers in order."""
    return backbone.encoder.layer


def attention_input(backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
    """What a layer's projections read: post-norm layers take their input as it is."""
    return states


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value projection of one layer."""
    attention = backbone.encoder.layer[layer].attention.self
    return linear_projection(attention.key), linear_projection(attention.value)


def finish_keys(backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
    """Keys (P, H, d) as attention reads them: BERT's projection is all there is."""
    return keys


def as_they_are(backbone: PreTrainedModel, layers: Sequence[int], states: Tensor) -> Tensor:
    """`attention_input` and `finish_keys` of several layers."""
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


def last_layer_tokens(layer: nn.Module, index: Tensor) -> nn.Module:
    """A view of a layer that computes, from its attention's output on, the tokens `index` (R,) of (B, N) alone."""

    def project(original: Callable[..., Any], attended: Tensor, residual: Tensor) -> Any:
        return original(gather_tokens(attended, index), gather_tokens(residual, index))

    def run(original: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return scatter_tokens(original(hidden, *args, **kwargs), index, hidden)

    attention = layer.attention
    attention = view_of(attention, children={"output": view_of(attention.output, forward=project)})
    return view_of(view_of(layer, children={"attention": attention}), forward=run)
