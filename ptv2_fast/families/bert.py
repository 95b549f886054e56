"""BERT and ELECTRA: post-norm encoders, whose layers project a prompt as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.tokens import gather_tokens, scatter_tokens
from ptv2_fast.backbone.view import view_of
from ptv2_fast.backbone.virtual_tokens import behind_prompts, of_the_text, visible_prompts
from ptv2_fast.families.family import Family


class Bert(Family):
    reads_first = True
    skips_unread_tokens = True
    layers_path = "encoder.layer"
    attention_path = "attention.self"
    key_path, value_path = "key", "value"

    def shallow_view(self, backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
        """A view of the backbone in which virtual tokens evolve in front of every row's text.

        Text cannot be computed without the virtual tokens nor they without the text, so the rows of both live in one
        (B, P + N, D) buffer that the embedding step writes once; what follows the last layer sees the text only.

        Args:
            backbone: any model that embeds by `embeddings` and then runs what holds the layers.
            prompts: (P, E) embeddings of the virtual tokens, at positions 0..P-1.

        Returns:
            A module called like the backbone.
        """
        length = prompts.shape[0]
        encoder, _, _ = self.layers_path.partition(".")

        def encode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return of_the_text(original(*args, **kwargs), length)

        def run(original: Callable[..., Any], *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            return original(*args, attention_mask=visible_prompts(attention_mask, length), **kwargs)

        children = {
            "embeddings": behind_prompts(backbone.embeddings, prompts),
            encoder: view_of(getattr(backbone, encoder), forward=encode),
        }
        return view_of(view_of(backbone, children=children), forward=run)

    def last_layer_tokens(self, layer: nn.Module, index: Tensor) -> nn.Module:
        """A view of a layer that computes, from its attention's output on, the tokens `index` (R,) of (B, N) alone."""

        def project(original: Callable[..., Any], attended: Tensor, residual: Tensor) -> Any:
            return original(gather_tokens(attended, index), gather_tokens(residual, index))

        def run(original: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return scatter_tokens(original(hidden, *args, **kwargs), index, hidden)

        attention = layer.attention
        attention = view_of(attention, children={"output": view_of(attention.output, forward=project)})
        return view_of(view_of(layer, children={"attention": attention}), forward=run)
