"""BART: post-norm stacks with learned positions, which are slots of the batch."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.backbone.view import view_of, with_modules
from ptv2_fast.families.dimensions import Dimensions


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers in order."""
    return backbone.encoder.layers


def sizes(backbone: PreTrainedModel) -> Dimensions:
    """The sizes, with a layer for each attention of both stacks."""
    config = backbone.config
    decoder = len(backbone.decoder.layers)
    return Dimensions(
        hidden_size=config.d_model,
        embedding_size=config.d_model,
        output_size=config.d_model,
        num_layers=len(backbone.encoder.layers) + 2 * decoder,
        num_heads=config.encoder_attention_heads,
        num_kv_heads=config.encoder_attention_heads,
        head_dim=config.d_model // config.encoder_attention_heads,
        initializer_range=config.init_std,
        decoder_layers=decoder,
    )


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value projection of one layer."""
    attention = backbone.get_submodule(_path(backbone, layer))
    return linear_projection(attention.k_proj), linear_projection(attention.v_proj)


def with_layer_index(backbone: PreTrainedModel) -> PreTrainedModel:
    """A view of the backbone whose attention modules know the layer of their prompt.

    `layer_idx` is where the decoder's cache keeps their keys and values.
    """
    paths = [_path(backbone, layer) for layer in range(sizes(backbone).num_layers)]
    return with_modules(
        backbone,
        {p: view_of(backbone.get_submodule(p), attributes={"prompt_layer": i}) for i, p in enumerate(paths)},
    )


def check(backbone: PreTrainedModel) -> None:
    """Refuse a stack alone, stacks of different heads, and layers that are left out at random.

    Raises:
        ValueError: the message says what is refused.
    """
    config = backbone.config
    if not (hasattr(backbone, "encoder") and hasattr(backbone, "decoder")):
        raise ValueError(f"base must have BART's encoder and its decoder; got {type(backbone).__name__}")
    heads = config.encoder_attention_heads, config.decoder_attention_heads
    if heads[0] != heads[1]:
        raise ValueError(f"base must have as many heads in its decoder as in its encoder, {heads[0]}; got {heads[1]}")
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name):
            raise ValueError(f"base must have {name} 0, since its layers have prompts; got {getattr(config, name)}")


def _path(backbone: PreTrainedModel, layer: int) -> str:
    """Where a layer's attention is."""
    stack, index = sizes(backbone).place(layer)
    name = "encoder_attn" if stack == "cross" else "self_attn"
    return f"{'encoder' if stack == 'encoder' else 'decoder'}.layers.{index}.{name}"
