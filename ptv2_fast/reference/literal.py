"""The three injections on Hugging Face backbones, literally: concat, mask, layer, slice.

These functions judge the fast path. They are slow on purpose and follow the definition step by
step. ``backbone`` is a model without a head (BertModel, LlamaModel, ...; ``backbones.FAMILIES``); its
weights, its mode and its attention implementation are left as they were. All of
them work in every floating dtype, give gradients to the prompts (and to whatever else asks for
them) and return the text's N rows after the backbone's last norm.

Shared conventions:

- ``attention_mask`` (B, N), nonzero at real tokens, padding anywhere; None means no padding.
- ``position_ids`` (B, N) as the backbone itself takes them (RoBERTa's start at padding_idx + 1),
  before any shift that an injection adds. None counts each row's real tokens from the first one.
- ``token_type_ids`` (B, N), encoders that have token types only; None means zeros.
- A sliding window counts the text's own tokens: padding has no width, and prompts are in every window
  (``masks.additive_mask``).
- Where a token's slot is its position (MPNet, DeBERTa), each row runs alone, without its padding.
- Rows of the output at padding are meaningless; a row of nothing but padding is finite.

Source: P-Tuning v2 (Liu et al., 2022), section 3; prompt tuning (Lester et al., 2021);
prefix tuning (Li and Liang, 2021).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, cast

import torch
from torch import Tensor, nn

from ptv2_fast.reference import backbones
from ptv2_fast.reference.masks import as_key_mask, positions_from_mask
from ptv2_fast.reference.prefix import PrefixByCall

P = ParamSpec("P")


def _rows_alone(literal: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let a literal form run row by row, without padding, where a token's slot is its position."""
    signature = inspect.signature(literal)

    by_name = cast(Callable[..., Tensor], literal)

    @functools.wraps(literal)
    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        call = dict(signature.bind(*args, **kwargs).arguments)
        backbone, ids, mask = call["backbone"], call["input_ids"], call.get("attention_mask")
        if mask is None or backbones.check_backbone(backbone) not in backbones.RELATIVE:
            return by_name(**call)
        real = as_key_mask(call.pop("attention_mask"), ids)
        by_token = [n for n in ("input_ids", "position_ids", "token_type_ids") if call.get(n) is not None]
        output = torch.zeros(*ids.shape, backbone.config.hidden_size, dtype=backbone.dtype, device=ids.device)
        for row, where in enumerate(real):
            if where.any():
                own = {name: call[name].expand(ids.shape)[row, where][None] for name in by_token}
                output = output.index_put((torch.tensor(row), where.nonzero()[:, 0]), by_name(**{**call, **own})[0])
        return output

    return run


@_rows_alone
def literal_deep(
    backbone: nn.Module,
    prompts: Tensor | Mapping[int, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    layers: Sequence[int] | None = None,
    prompt_bias: Tensor | None = None,
) -> Tensor:
    """Give every layer its own prompts, concatenated to its input and sliced off its output.

    h[i + 1] = layer[i]([prompts[i] ; h[i]])[P:], then the final norm. Prompts get no learned
    position and no embedding norm. With rotary positions prompts stand at 0..P-1 and the text is
    shifted by P in that layer; with learned positions the text stays where it is.

    Args:
        prompts: (L, P, D), or (len(layers), P, D), or a mapping from layer index to (P, D); a layer
            without prompts runs plain.
        input_ids: (B, N) int64.
        layers: which layers the first axis of ``prompts`` (and of ``prompt_bias``) stands for.
        prompt_bias: (L or len(layers), H, P), added to the scores of the prompts; None means 0.

    Returns:
        (B, N, D).

    Raises:
        ValueError: the backbone is not covered, or a shape or a layer index disagrees.
    """
    backbones.check_backbone(backbone)
    _check_token_types(backbone, token_type_ids)
    key_mask = as_key_mask(attention_mask, input_ids)
    positions = _text_positions(backbone, key_mask, position_ids)
    by_layer = _by_layer("prompts", prompts, layers, backbone, 2)
    bias_by_layer = _by_layer("prompt_bias", prompt_bias, layers, backbone, 2)

    with backbones.plain_attention_in(backbone):
        embedded = hidden = backbones.embed(backbone, input_ids, positions, token_type_ids)
        for index in range(len(backbones.layers_of(backbone))):
            prompt = by_layer.get(index, hidden.new_zeros(0, hidden.shape[2]))
            length = prompt.shape[0]
            rows = torch.cat([prompt.expand(len(hidden), -1, -1), hidden], dim=1)  # [B, P+N, D]
            masks = backbones.masks_by_kind(backbone, key_mask, length, hidden.dtype)
            mask = masks[backbones.layer_kind(backbone, index)]
            if index in bias_by_layer:
                bias = bias_by_layer[index][None, :, None, :]  # [1, H, 1, P]
                mask = mask + nn.functional.pad(bias, (0, input_ids.shape[1]))
            row_positions = _prepend_prompt_positions(positions, length, first=0)
            hidden = backbones.run_layer(backbone, index, rows, mask, row_positions, length)[:, length:]
            hidden = backbones.after_layer(backbone, index, embedded, hidden)
        return backbones.final_norm(backbone, hidden)


@_rows_alone
def literal_shallow(
    backbone: nn.Module,
    prompts: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
) -> Tensor:
    """Concatenate prompts to the word embeddings once and let them evolve through every layer.

    backbone(inputs_embeds=[prompts ; word_embeddings(input_ids)])[P:], run by the backbone's own
    forward. Prompts stand at positions 0..P-1, have token type 0 and go through the embedding norm
    where there is one; the text is shifted by P.

    Args:
        prompts: (P, E), of the size that word embeddings have.
        input_ids: (B, N) int64.

    Returns:
        (B, N, D).

    Raises:
        ValueError: the backbone is not covered, or a shape disagrees.
    """
    backbones.check_backbone(backbone)
    _check_token_types(backbone, token_type_ids)
    key_mask = as_key_mask(attention_mask, input_ids)
    positions = _text_positions(backbone, key_mask, position_ids)
    words = backbone.get_input_embeddings()(input_ids)
    if prompts.dim() != 2 or prompts.shape[1] != words.shape[2]:
        raise ValueError(f"prompts must be (prompt length, {words.shape[2]}); got {tuple(prompts.shape)}")
    length = prompts.shape[0]
    inputs = {
        "inputs_embeds": torch.cat([prompts.expand(len(words), -1, -1), words], dim=1),
        "attention_mask": backbones.mask_argument(
            backbone, backbones.masks_by_kind(backbone, key_mask, length, words.dtype)
        ),
        "position_ids": _prepend_prompt_positions(positions, length, first=backbones.first_position(backbone)),
    }
    if token_type_ids is not None:
        inputs["token_type_ids"] = nn.functional.pad(token_type_ids, (length, 0))
    with backbones.plain_attention_in(backbone):
        return backbone(**inputs, use_cache=False)[0][:, length:]


@_rows_alone
def literal_prefix(
    backbone: nn.Module,
    keys: Tensor | Mapping[int, Tensor],
    values: Tensor | Mapping[int, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    position_offset: int = 0,
    token_type_ids: Tensor | None = None,
    layers: Sequence[int] | None = None,
    prompt_bias: Tensor | None = None,
) -> Tensor:
    """Put P key and value rows in front of each layer's own, copied for every row of the batch.

    In layer i: softmax(scale * q [keys[i] ; k]^T + [bias ; mask]) [values[i] ; v]. The keys are
    used as given: no projection, norm or rotation is applied to them.

    Args:
        keys: (L, Hkv, P, d), or (len(layers), Hkv, P, d), or a mapping from layer index to
            (Hkv, P, d); a layer without any runs plain.
        values: like ``keys``.
        input_ids: (B, N) int64.
        position_offset: added to the text's positions.
        layers: which layers the first axis of ``keys`` and ``values`` stands for.
        prompt_bias: (L or len(layers), H, P), added to the scores of the prefix; None means 0.

    Returns:
        (B, N, D).

    Raises:
        ValueError: the backbone is not covered, or a shape or a layer index disagrees.
    """
    backbones.check_backbone(backbone)
    _check_token_types(backbone, token_type_ids)
    key_mask = as_key_mask(attention_mask, input_ids)
    keys_by_layer = _by_layer("keys", keys, layers, backbone, 3)
    values_by_layer = _by_layer("values", values, layers, backbone, 3)
    bias_by_layer = _by_layer("prompt_bias", prompt_bias, layers, backbone, 2)
    if keys_by_layer.keys() != values_by_layer.keys():
        raise ValueError(
            f"values must be given for the layers of keys, {sorted(keys_by_layer)}; got {sorted(values_by_layer)}"
        )
    prefix = {}
    for index, key in keys_by_layer.items():
        value = values_by_layer[index]
        if value.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"values must have the heads and the length of keys, {tuple(key.shape[:2])}; "
                f"got {tuple(value.shape[:2])} in layer {index}"
            )
        prefix[index] = (key, value, bias_by_layer.get(index))

    inputs = {
        "input_ids": input_ids,
        "attention_mask": backbones.mask_argument(
            backbone, backbones.masks_by_kind(backbone, key_mask, 0, backbone.dtype)
        ),
        "position_ids": position_offset + _text_positions(backbone, key_mask, position_ids),
    }
    if token_type_ids is not None:
        inputs["token_type_ids"] = token_type_ids
    prefix_by_call = PrefixByCall(prefix)
    with backbones.plain_attention_in(backbone, prefix_by_call):
        return backbone(**inputs, use_cache=False, literal_prefix=prefix_by_call)[0]


def _text_positions(backbone: nn.Module, key_mask: Tensor, position_ids: Tensor | None) -> Tensor:
    if position_ids is None:
        return backbones.first_position(backbone) + positions_from_mask(key_mask)
    if position_ids.dim() != 2 or position_ids.shape[1] != key_mask.shape[1]:
        raise ValueError(f"position_ids must be (batch or 1, {key_mask.shape[1]}); got {tuple(position_ids.shape)}")
    return position_ids.expand(key_mask.shape)


def _prepend_prompt_positions(positions: Tensor, prompt_length: int, first: int) -> Tensor:
    """Return (B, P+N): the prompts at first..first+P-1, the text shifted by P."""
    prompt = first + torch.arange(prompt_length, device=positions.device)
    prompt = prompt.expand(len(positions), -1)
    return torch.cat([prompt, prompt_length + positions], dim=1)


def _check_token_types(backbone: nn.Module, token_type_ids: Tensor | None) -> None:
    family = backbone.config.model_type
    typed = set(backbones.ENCODERS) - set(backbones.WITHOUT_TOKEN_TYPES)
    if token_type_ids is not None and family not in typed:
        raise ValueError(f"token_type_ids must be None for {family}, which has no token types")


def _by_layer(
    name: str,
    stacked: Tensor | Mapping[int, Tensor] | None,
    layers: Sequence[int] | None,
    backbone: nn.Module,
    entry_dims: int,
) -> dict[int, Tensor]:
    """Turn stacked per-layer tensors, or a mapping, into {layer index: tensor}."""
    if stacked is None:
        return {}
    num_layers = len(backbones.layers_of(backbone))
    if isinstance(stacked, Tensor):
        indices = range(num_layers) if layers is None else list(layers)
        if len(set(indices)) != len(indices):
            raise ValueError(f"layers must name each layer once; got {indices}")
        if len(stacked) != len(indices):
            raise ValueError(f"{name} must have {len(indices)} layers on its first axis; got {len(stacked)}")
        by_layer = dict(zip(indices, stacked, strict=True))
    elif layers is None:
        by_layer = dict(stacked)
    else:
        raise ValueError(f"layers must be None where {name} is a mapping; got {layers!r}")
    for index, entry in by_layer.items():
        if index not in range(num_layers):
            raise ValueError(f"{name} must be for layers 0..{num_layers - 1}; got layer {index!r}")
        if entry.dim() != entry_dims:
            raise ValueError(f"{name} must have {entry_dims} axes per layer; got {tuple(entry.shape)}")
    return by_layer
