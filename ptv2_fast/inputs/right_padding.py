"""Rows with their tokens first: for models whose positions are slots, where padding before a token would count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ptv2_fast.backbone.view import view_of

M = TypeVar("M", bound=nn.Module)

# What outputs hold by token: of a model, and of a decoder and its encoder.
OUTPUT_STATES = ("last_hidden_state", "logits")
ENCODER_STATES = ("encoder_last_hidden_state", "encoder_hidden_states")
HIDDEN_STATES = ("hidden_states", "decoder_hidden_states", *ENCODER_STATES)
_BY_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")


def to_right_padding(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """`inputs` with each row's real tokens in front of its padding, in their order, and how to put states back.

    Padding behind the text is the same text. Nothing waits for the device.

    Returns:
        The inputs, and (B, N) the slot in which each token of the given rows stands; None where there is no mask.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return dict(inputs), None
    back = _slots_behind(mask != 0)
    slots = torch.arange(mask.shape[1], device=mask.device).expand_as(back)
    source = torch.zeros_like(back).scatter(1, back, slots)  # (B, N)
    turned = dict(inputs)
    for name in _BY_TOKEN:
        value = inputs.get(name)
        if value is not None:
            turned[name] = reorder_tokens(value.expand(mask.shape[0], *value.shape[1:]), source)
    return turned, back


def _slots_behind(real: Tensor) -> Tensor:
    """(B, N) the slot that each token goes to: real ones in their order, then padding in its own."""
    order = real.long().cumsum(1)
    rest = (~real).long().cumsum(1) + order[:, -1:]
    return torch.where(real, order, rest) - 1


def reorder_tokens(values: Tensor, source: Tensor) -> Tensor:
    """(B, N, ...) with the value of slot source[b, n] in slot n of row b."""
    return values[torch.arange(values.shape[0], device=values.device)[:, None], source]


def change_states(output: Any, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> None:
    """Replace tensors (B, N, ...), or every one of a tuple of them, that an output has under some of these names."""
    for name in names:
        states = getattr(output, name, None)
        if states is not None:
            setattr(output, name, tuple(map(change, states)) if isinstance(states, tuple) else change(states))


def with_right_padding(backbone: M) -> M:
    """A view of a backbone that runs each row's tokens first, whatever the padding or packing of its call.

    It is called like the backbone, with the prompts among its inputs; its outputs stand where the call has the tokens.
    A packed call runs as one padded row for each packed one.
    """

    def forward(original: Callable[..., Any], input_ids: Tensor | None = None, **call: Any) -> Any:
        call = {name: value for name, value in {"input_ids": input_ids, **call}.items() if value is not None}
        bounds = call["ptv2_prompts"].cu_seqlens
        if bounds is None:
            call, back = to_right_padding(call)

            def restored(states: Tensor) -> Tensor:
                return states if back is None else reorder_tokens(states, back)
        else:
            rows, tokens = _sizes(call)
            call, place = _unpacked(call, bounds, call["ptv2_prompts"].max_seqlen or rows * tokens)

            def restored(states: Tensor) -> Tensor:
                return states.flatten(0, 1).index_select(0, place).unflatten(0, (rows, tokens))

        output = original(**call)
        change_states(output, (*OUTPUT_STATES, *HIDDEN_STATES), restored)
        return output

    return view_of(backbone, forward=forward)


def _sizes(call: Mapping[str, Any]) -> tuple[int, int]:
    text = call["input_ids"] if "input_ids" in call else call["inputs_embeds"]
    rows, tokens = text.shape[:2]
    return rows, tokens


def _unpacked(call: Mapping[str, Any], bounds: Tensor, longest: int) -> tuple[dict[str, Any], Tensor]:
    """A packed call as a padded one, and (B * N,) where each of its tokens stands in the flattened padded batch.

    Args:
        bounds: (S + 1,) boundaries of the S packed rows in the flattened (B, N).
    """
    rows, tokens = _sizes(call)
    slots = torch.arange(rows * tokens, device=bounds.device)
    row_of = torch.searchsorted(bounds[1:].contiguous(), slots, right=True)
    place = row_of * longest + slots - bounds[row_of]
    source = bounds[:-1, None] + torch.arange(longest, device=bounds.device)  # (S, longest)
    real = source < bounds[1:, None]
    source = source.clamp(max=rows * tokens - 1).long()
    padded = dict(call)
    for name in _BY_TOKEN:
        if name in call:
            value = call[name]
            padded[name] = value.expand(rows, *value.shape[1:]).flatten(0, 1)[source]
    padded["attention_mask"] = real
    padded["ptv2_prompts"] = replace(call["ptv2_prompts"], cu_seqlens=None, max_seqlen=None)
    return padded, place
