"""BERT and RoBERTa: post-norm encoders, whose layers project a prompt as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.models.pooling import pool
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


def roberta_first_position(backbone: PreTrainedModel) -> int:
    """RoBERTa counts positions from padding_idx + 1."""
    return backbone.embeddings.padding_idx + 1


def shallow_view(backbone: PreTrainedModel, prompts: Tensor) -> nn.Module:
    """A view of the backbone in which virtual tokens evolve in front of every row's text.

    Text cannot be computed without the virtual tokens nor they without the text, so the rows of
    both live in one (B, P + N, D) buffer that the embedding step writes once; what follows the last
    layer sees the text only.

    Args:
        backbone: BertModel or RobertaModel.
        prompts: (P, D) embeddings of the virtual tokens, at positions 0..P-1.

    Returns:
        A module called like the backbone, with a (B, P + N) attention mask beside inputs of N
        tokens.
    """
    length = prompts.shape[0]

    def embed(original, input_ids=None, inputs_embeds=None, **kwargs):
        text = original(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)  # (B, N, D)
        # Without position ids the embedding module counts from its own first position.
        virtual = original(inputs_embeds=prompts[None].to(text.dtype))  # (1, P, D)
        return torch.cat([virtual.expand(text.shape[0], -1, -1), text], dim=1)

    def encode(original, *args, **kwargs):
        output = original(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state[:, length:]
        return output

    children = {
        "embeddings": view_of(backbone.embeddings, forward=embed),
        "encoder": view_of(backbone.encoder, forward=encode),
    }
    return view_of(backbone, children=children)


def first_token_view(target: PreTrainedModel, attention_mask: Tensor) -> nn.Module:
    """A view of a sequence classifier whose head reads each row's first real token instead of its first slot.

    With left padding the first slot is padding. BERT's head reads it in the backbone's pooler, RoBERTa's in its
    classifier; both get the one row that they would read.
    """

    def read(original, hidden, *args, **kwargs):
        return original(pool(hidden, attention_mask, "first")[:, None], *args, **kwargs)

    backbone = target.base_model
    if getattr(backbone, "pooler", None) is None:
        return view_of(target, children={"classifier": view_of(target.classifier, forward=read)})
    pooled = view_of(backbone, children={"pooler": view_of(backbone.pooler, forward=read)})
    return view_of(target, children={target.base_model_prefix: pooled})


def read_rows(layer: nn.Module, index: Tensor) -> nn.Module:
    """A view of a layer that computes, from its attention's output on, the tokens `index` (R,) of (B, N) alone."""

    def project(original, attended, residual):
        return original(gather_rows(attended, index), gather_rows(residual, index))

    def run(original, hidden, *args, **kwargs):
        return scatter_rows(original(hidden, *args, **kwargs), index, hidden)

    attention = layer.attention
    attention = view_of(attention, children={"output": view_of(attention.output, forward=project)})
    return view_of(view_of(layer, children={"attention": attention}), forward=run)
