"""The three injections on ViT, DINOv2, CLIP's towers and Whisper's encoder, literally: concat, layer, slice.

The conventions are those of `literal`: slow on purpose, in every floating dtype, with gradients to the prompts; the
backbone's weights, mode and attention implementation are left as they were. Images and sounds have no padding, and
their prompts no position: where prompts stand among the rows makes no difference, which `behind` is there to show.
CLIP's text is causal: prompts stand in front of it, at positions 0..P-1 where they are shallow.

Source: visual prompt tuning (Jia et al., 2022), VPT-deep and VPT-shallow; prefix tuning (Li and Liang, 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptv2_fast.reference.backbones import plain_attention_in
from ptv2_fast.reference.masks import additive_mask, as_key_mask, positions_from_mask
from ptv2_fast.reference.prefix import PrefixByCall

# A backbone's last states (B, N, D), and what enters each layer and leaves the last one, (L + 1) of (B, N, D).
States = tuple[Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Form:
    """What the literal forms must know of a family.

    Attributes:
        layers: (backbone) -> its layers in order.
        embed: (backbone, pixel values or input features) -> the rows (B, N, D) as they are before anything is learned
            of one another, positions included. A text's are embedded with its positions.
        first_input: (backbone, embedded) -> what the first layer reads.
        last_norm: (backbone, hidden) -> the last states.
        is_text: it reads token ids, causally.
    """

    layers: Callable[[nn.Module], Sequence[nn.Module]]
    embed: Callable[[nn.Module, Tensor], Tensor] = lambda backbone, inputs: backbone.embeddings(inputs)
    first_input: Callable[[nn.Module, Tensor], Tensor] = lambda backbone, embedded: embedded
    last_norm: Callable[[nn.Module, Tensor], Tensor] = lambda backbone, hidden: hidden
    is_text: bool = False


def _frames(backbone: nn.Module, features: Tensor) -> Tensor:
    """Whisper's."""
    frames = nn.functional.gelu(backbone.conv2(nn.functional.gelu(backbone.conv1(features))))
    return frames.transpose(1, 2) + backbone.embed_positions.weight


_DINOV2 = Form(lambda backbone: backbone.encoder.layer, last_norm=lambda backbone, hidden: backbone.layernorm(hidden))
# `config.model_type` -> what the literal forms know of it.
FORMS = {
    "vit": Form(lambda backbone: backbone.layers, last_norm=lambda backbone, hidden: backbone.layernorm(hidden)),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    # CLIP's vision tower norms what it pools, and nothing else.
    "clip_vision_model": Form(
        lambda backbone: backbone.encoder.layers,
        first_input=lambda backbone, embedded: backbone.pre_layrnorm(embedded),
    ),
    "clip_text_model": Form(
        lambda backbone: backbone.encoder.layers,
        last_norm=lambda backbone, hidden: backbone.final_layer_norm(hidden),
        is_text=True,
    ),
    "whisper": Form(
        lambda backbone: backbone.layers, _frames, last_norm=lambda backbone, hidden: backbone.layer_norm(hidden)
    ),
}


def literal_deep_features(
    backbone: nn.Module,
    prompts: Tensor,
    inputs: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
    prompt_bias: Tensor | None = None,
    behind: int = 0,
) -> States:
    """Give every layer its own prompts, concatenated to its input and sliced off its output.

    Args:
        prompts: (L, P, D), or (len(layers), P, D).
        inputs: pixel_values (B, C, H, W), input_features (B, M, F), or token ids (B, N).
        attention_mask: (B, N), of ids only.
        layers: which layers the first axis of ``prompts`` and ``prompt_bias`` stands for; the others run plain.
        prompt_bias: (L or len(layers), H, P), added to the scores of the prompts.
        behind: how many of the backbone's own rows stand in front of the prompts; 1 is behind a class token.

    Returns:
        The last states, and those between the layers.
    """
    _check(backbone)
    run_layers = _layers(backbone)
    indices = range(len(run_layers)) if layers is None else layers
    by_layer = dict(zip(indices, prompts, strict=True))
    bias_by_layer = {} if prompt_bias is None else dict(zip(indices, prompt_bias, strict=True))
    with plain_attention_in(backbone):
        hidden = _first_input(backbone, _embed(backbone, inputs, attention_mask))
        states = [hidden]
        for index, layer in enumerate(run_layers):
            prompt = by_layer.get(index, hidden.new_zeros(0, hidden.shape[2]))
            length = prompt.shape[0]
            mask = _mask(backbone, inputs, attention_mask, hidden, length)
            if index in bias_by_layer:
                bias = bias_by_layer[index][None, :, None, :]  # [1, H, 1, P]
                mask = mask + nn.functional.pad(bias, (behind, hidden.shape[1] - behind))
            hidden = _without(_run(layer, _with(hidden, prompt, behind), mask), length, behind)
            states.append(hidden)
        return _last_norm(backbone, hidden), tuple(states)


def literal_shallow_features(
    backbone: nn.Module,
    prompts: Tensor,
    inputs: Tensor,
    attention_mask: Tensor | None = None,
    *,
    behind: int = 0,
) -> States:
    """Concatenate prompts to the embeddings once and let them evolve through every layer.

    Prompts (P, D) of images and sounds stand behind the position embeddings and get none; in CLIP's vision tower they
    go through the norm in front of the first layer, as the patches do. In front of a text they get the first P position
    embeddings, and the text those from P on.
    """
    _check(backbone)
    length = prompts.shape[0]
    with plain_attention_in(backbone):
        if _is_text(backbone):
            places = torch.arange(length, device=prompts.device)
            virtual = prompts + backbone.embeddings.position_embedding(places)
            own = _embed(backbone, inputs, attention_mask, shift=length)
        else:
            virtual, own = prompts, _embed(backbone, inputs, attention_mask)
        hidden = _first_input(backbone, _with(own, virtual, behind))
        mask = _mask(backbone, inputs, attention_mask, own, length)
        states = [hidden]
        for layer in _layers(backbone):
            hidden = _run(layer, hidden, mask)
            states.append(hidden)
        last = _last_norm(backbone, hidden)
    return _without(last, length, behind), tuple(_without(one, length, behind) for one in states)


def literal_prefix_features(
    backbone: nn.Module,
    keys: Tensor,
    values: Tensor,
    inputs: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
    prompt_bias: Tensor | None = None,
) -> States:
    """Put P key and value rows, (L or len(layers), H, P, d), in front of each layer's own; no layer changes them."""
    _check(backbone)
    run_layers = _layers(backbone)
    indices = list(range(len(run_layers)) if layers is None else layers)
    biases = [None] * len(indices) if prompt_bias is None else prompt_bias
    prefix = PrefixByCall({i: (k, v, b) for i, k, v, b in zip(indices, keys, values, biases, strict=True)})
    with plain_attention_in(backbone):
        hidden = _first_input(backbone, _embed(backbone, inputs, attention_mask))
        mask = _mask(backbone, inputs, attention_mask, hidden, 0)
        states = [hidden]
        for layer in run_layers:
            hidden = _run(layer, hidden, mask, literal_prefix=prefix)
            states.append(hidden)
        return _last_norm(backbone, hidden), tuple(states)


def _check(backbone: nn.Module) -> None:
    """Refuse what the forms above do not cover.

    Raises:
        ValueError: another family, or Whisper's model around its encoder.
    """
    family = backbone.config.model_type
    if family not in FORMS or (family == "whisper" and not hasattr(backbone, "conv1")):
        raise ValueError(f"backbone must be one of {', '.join(FORMS)}; got {type(backbone).__name__}")


def _form(backbone: nn.Module) -> Form:
    return FORMS[backbone.config.model_type]


def _is_text(backbone: nn.Module) -> bool:
    return _form(backbone).is_text


def _layers(backbone: nn.Module) -> Sequence[nn.Module]:
    return _form(backbone).layers(backbone)


def _embed(backbone: nn.Module, inputs: Tensor, attention_mask: Tensor | None, shift: int = 0) -> Tensor:
    """(B, N, D): the rows as they are before anything is learned of one another, positions included."""
    if _is_text(backbone):
        positions = shift + positions_from_mask(as_key_mask(attention_mask, inputs))
        return backbone.embeddings(input_ids=inputs, position_ids=positions)
    return _form(backbone).embed(backbone, inputs)


def _first_input(backbone: nn.Module, embedded: Tensor) -> Tensor:
    """What the first layer reads of embeddings."""
    return _form(backbone).first_input(backbone, embedded)


def _last_norm(backbone: nn.Module, hidden: Tensor) -> Tensor:
    return _form(backbone).last_norm(backbone, hidden)


def _mask(backbone: nn.Module, inputs: Tensor, attention_mask: Tensor | None, hidden: Tensor, length: int) -> Tensor:
    """(B, 1, P + N, P + N), added to the scores."""
    if _is_text(backbone):
        key_mask = as_key_mask(attention_mask, inputs)
        return additive_mask(key_mask, length, causal=True, dtype=hidden.dtype)
    total = length + hidden.shape[1]
    return hidden.new_zeros(len(hidden), 1, total, total)


def _run(layer: nn.Module, hidden: Tensor, mask: Tensor, **others: object) -> Tensor:
    output = layer(hidden, mask, **others)
    return output[0] if isinstance(output, tuple) else output


def _with(hidden: Tensor, prompt: Tensor, behind: int) -> Tensor:
    virtual = prompt.expand(len(hidden), -1, -1)
    return torch.cat([hidden[:, :behind], virtual, hidden[:, behind:]], dim=1)


def _without(hidden: Tensor, length: int, behind: int) -> Tensor:
    return torch.cat([hidden[:, :behind], hidden[:, behind + length :]], dim=1)
