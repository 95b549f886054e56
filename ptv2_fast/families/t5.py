"""T5 and mT5: pre-norm stacks without biases, whose scores get a learned bias for the distance of two tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.backbone.view import view_of, with_modules
from ptv2_fast.backbone.virtual_tokens import of_the_text, visible_prompts, with_virtual_tokens
from ptv2_fast.families.dimensions import Dimensions


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The encoder's blocks in order."""
    return backbone.encoder.block


def sizes(backbone: PreTrainedModel) -> Dimensions:
    """The sizes, with a layer for each attention of both stacks; a T5EncoderModel has the encoder's alone."""
    config = backbone.config
    decoder = len(backbone.decoder.block) if hasattr(backbone, "decoder") else 0
    return Dimensions(
        hidden_size=config.d_model,
        embedding_size=config.d_model,
        output_size=config.d_model,
        num_layers=len(backbone.encoder.block) + 2 * decoder,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_dim=config.d_kv,
        initializer_range=0.02,
        decoder_layers=decoder,
    )


def attention_input(backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
    """What a layer's projections read: a block's input, normed; in cross-attention the encoder's output as it is."""
    stack, _ = sizes(backbone).place(layer)
    return states if stack == "cross" else _part(backbone, layer).layer_norm(states)


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value projection of one layer."""
    attention = _attention(_part(backbone, layer))
    return linear_projection(attention.k), linear_projection(attention.v)


def far_keys_and_bias(backbone: PreTrainedModel, layer: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (H, P, d), and the bias (H, P) of the farthest distance in front of a token.

    Distances share buckets, and the last one in front holds all that are as large as the model can tell. The first
    block has the table of its stack; cross-attention has none.
    """
    stack, _ = sizes(backbone).place(layer)
    if stack == "cross":
        return keys, keys.new_zeros(keys.shape[:2])
    attention = getattr(backbone, stack).block[0].layer[0].SelfAttention
    buckets = attention.relative_attention_num_buckets
    # An encoder's second half is for distances behind a token.
    last = buckets - 1 if stack == "decoder" else buckets // 2 - 1
    return keys, attention.relative_attention_bias.weight[last][:, None].expand(-1, keys.shape[1])


def with_layer_index(backbone: PreTrainedModel) -> PreTrainedModel:
    """A view of the backbone whose attention modules know the layer of their prompt.

    `layer_idx` is where the decoder's cache keeps their keys and values.
    """
    known = sizes(backbone)
    numbered = {}
    for layer in range(known.num_layers):
        stack, index = known.place(layer)
        name = "EncDecAttention" if stack == "cross" else "SelfAttention"
        path = f"{'encoder' if stack == 'encoder' else 'decoder'}.block.{index}.layer.{int(stack == 'cross')}.{name}"
        numbered[path] = view_of(_attention(_part(backbone, layer)), attributes={"prompt_layer": layer})
    return with_modules(backbone, numbered)


def shallow_view(backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
    """A view of an encoder alone in which virtual tokens evolve in front of every row's text, P tokens nearer to it
    than anything else would be: distances count them."""
    length = prompts.shape[0]

    def run(
        original: Callable[..., Any],
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        words = backbone.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        mask = visible_prompts(attention_mask, length)
        return of_the_text(
            original(inputs_embeds=with_virtual_tokens(prompts, words), attention_mask=mask, **kwargs), length
        )

    return view_of(backbone, forward=run)


def check(backbone: PreTrainedModel) -> None:
    """Refuse a stack alone, the one class that has its own head beside its stacks, and an attention of T5's own.

    Raises:
        ValueError: the message names the class, and the version where that is the reason.
    """
    name = type(backbone).__name__
    if not hasattr(sys.modules[type(backbone).__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(
            f"base must use transformers' attention interface, which T5 uses in later versions; got {name} of "
            f"transformers {transformers.__version__}"
        )
    if not hasattr(backbone, "encoder") or hasattr(backbone, "qa_outputs"):
        raise ValueError(
            "base must be T5Model, T5EncoderModel, T5ForConditionalGeneration, T5ForSequenceClassification or "
            f"T5ForTokenClassification, or that of mT5; got {name}"
        )


def _part(backbone: PreTrainedModel, layer: int) -> nn.Module:
    """A block's norm and attention."""
    stack, index = sizes(backbone).place(layer)
    block = (backbone.encoder if stack == "encoder" else backbone.decoder).block[index]
    return block.layer[int(stack == "cross")]


def _attention(part: nn.Module) -> nn.Module:
    return part.EncDecAttention if hasattr(part, "EncDecAttention") else part.SelfAttention
