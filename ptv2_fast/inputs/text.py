"""What a forward pass needs to know about its inputs: sizes, positions of the text, packed rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.sharded_weights import device_of


class PackedRows(NamedTuple):
    """Where the tokens of a flattened (B, N) are S packed rows.

    Attributes:
        cu_seqlens: (S + 1,) int32 boundaries.
        row_of: (S,) the batch row that each packed row stands in.
        longest: the most tokens of a packed row.
    """

    cu_seqlens: Tensor
    row_of: Tensor
    longest: int


def check_inputs(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    past_length: int | Tensor,
    prefix: str = "",
) -> tuple[int, int]:
    """Rows B and tokens N of the call; `prefix` stands before the names of its inputs in messages.

    Raises:
        ValueError: not exactly one of input_ids and inputs_embeds, no text in it, or a mask of another length.
    """
    named = {f"{prefix}input_ids": input_ids, f"{prefix}inputs_embeds": inputs_embeds}
    for name, value in named.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor; got {type(value).__name__}")
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"exactly one of {' and '.join(named)} must be given")
    if input_ids is not None and (input_ids.dim() != 2 or input_ids.is_floating_point()):
        raise ValueError(
            f"{prefix}input_ids must be integers of shape (B, N); got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    if inputs_embeds is not None and inputs_embeds.dim() != 3:
        raise ValueError(f"{prefix}inputs_embeds must have shape (B, N, D); got {tuple(inputs_embeds.shape)}")
    text: Any = input_ids if input_ids is not None else inputs_embeds
    rows, tokens = text.shape[:2]
    if rows == 0 or tokens == 0:
        name = "input_ids" if input_ids is not None else "inputs_embeds"
        raise ValueError(f"{prefix}{name} must hold at least one row and one token; got {rows} rows of {tokens} tokens")
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        if isinstance(past_length, Tensor):
            return rows, tokens  # reading a static cache's length would wait for the device
        expected = (rows, past_length + tokens)
        if attention_mask.shape != expected:
            raise ValueError(
                f"{prefix}attention_mask must have shape {expected}: {rows} rows, {past_length} cached tokens and "
                f"{tokens} new ones (the prompt is not masked); got {tuple(attention_mask.shape)}"
            )
    elif isinstance(attention_mask, Tensor) and attention_mask.dim() != 4:
        raise ValueError(f"{prefix}attention_mask must have 2 or 4 dimensions; got {tuple(attention_mask.shape)}")
    return rows, tokens


def text_size(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows B and tokens N of the text among a forward's inputs.

    Raises:
        ValueError: there is no text, or it is no tensor of rows.
    """
    text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if not isinstance(text, Tensor) or text.dim() < 2:
        found = type(text).__name__ if not isinstance(text, Tensor) else tuple(text.shape)
        raise ValueError(f"input_ids or inputs_embeds must be given as a tensor of rows; got {found}")
    rows, tokens = text.shape[:2]
    return rows, tokens


def check_beside(inputs: Mapping[str, Any], rows: int, tokens: int, base: PreTrainedModel, prefix: str = "") -> None:
    """Refuse what does not stand beside the text, token by token, on the base's device.

    Args:
        prefix: stands before the names of inputs in messages.

    Raises:
        ValueError: the message names the input.
    """
    # accelerate moves the inputs of a base that it has spread over several devices.
    device = None if getattr(base, "hf_device_map", None) else device_of(base)
    for name in ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"):
        value = inputs.get(name)
        if value is None or (name == "attention_mask" and isinstance(value, Mapping)):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{prefix}{name} must be a tensor; got {type(value).__name__}")
        if device is not None and value.device != device:
            raise ValueError(f"{prefix}{name} must be on the model's device {device}; got {value.device}")
        beside = name in ("token_type_ids", "position_ids") and value.dim() <= 2
        if beside and (value.dim() != 2 or value.shape[0] not in (1, rows) or value.shape[1] != tokens):
            raise ValueError(f"{name} must have shape {(rows, tokens)}, beside the text; got {tuple(value.shape)}")


def full_mask(
    attention_mask: Tensor | None, position_ids: Tensor | None, past_length: int | Tensor, input_ids: Tensor | None
) -> Tensor | None:
    """The mask of the whole text, where `generate` cut it to the slots that a static cache with a window holds.

    The slots in front, which no layer reads any more, count as padding; positions are the ones that `generate` gave.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or position_ids is None or input_ids is None:
        return attention_mask
    if isinstance(past_length, Tensor) or not past_length:
        return attention_mask
    missing = past_length + input_ids.shape[1] - attention_mask.shape[1]
    return torch.nn.functional.pad(attention_mask, (missing, 0)) if missing > 0 else attention_mask


def text_positions(
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    *,
    rows: int,
    tokens: int,
    past_length: int | Tensor,
    first: int,
    offset: int | Tensor,
    device: torch.device,
) -> Tensor | None:
    """Position ids of the text, or None where the model's own are right.

    A row's real tokens count up from `first` wherever its padding stands, so that a left-padded row, a right-padded row
    and the row alone are the same row: what counts with rotary positions is their distance to the prompt.

    Args:
        position_ids: the caller's, (B or 1, N), in the model's own numbering; None derives them.
        attention_mask: (B, past + N), or None.
        first: the family's first position.
        offset: added to every position: P for shallow prompts at learned positions, or (B, 1) where
            rows differ.
    """
    if position_ids is not None:
        return position_ids + offset
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        counted = attention_mask.long().cumsum(-1)
        if counted.shape[1] != tokens:
            counted = counted[:, -tokens:]
        counted = (counted - 1).clamp(min=0)
        shift = first + offset
        return counted + shift if isinstance(shift, Tensor) or shift else counted
    if isinstance(offset, int) and offset == 0:
        return None
    return (torch.arange(tokens, device=device) + first + past_length).expand(rows, -1) + offset


def packing_from_positions(position_ids: Tensor | None, attention_mask: Any) -> PackedRows | None:
    """Packed rows, read off positions that restart; None where each row is one text.

    As in transformers, a batch with a mask is padded, not packed.
    """
    if position_ids is None or attention_mask is not None or position_ids.dim() != 2:
        return None
    batch, tokens = position_ids.shape
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    begin = starts.flatten().nonzero().flatten()
    if begin.numel() == batch:
        return None
    end = torch.tensor([batch * tokens], device=begin.device)
    bounds = torch.cat([begin, end])
    return PackedRows(bounds.to(torch.int32), begin // tokens, int(bounds.diff().max()))


def packing_from_cu_seqlens(inputs: dict[str, Any]) -> PackedRows | None:
    """Packed rows whose boundaries the caller states (and this takes out of `inputs`); None where there are none.

    `cu_seq_lens_q` and `max_length_q` are what transformers' DataCollatorWithFlattening returns. Stated, they cost no
    look at the device; position ids that are left out are counted from them.

    Raises:
        ValueError: they do not describe a batch of one packed row of tokens.
    """
    bounds, longest = inputs.pop("cu_seq_lens_q", None), inputs.pop("max_length_q", None)
    for name in ("cu_seq_lens_k", "max_length_k", "seq_idx"):
        inputs.pop(name, None)
    if bounds is None:
        return None
    text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    if bounds.dim() != 1 or bounds.dtype != torch.int32:
        raise ValueError(f"cu_seq_lens_q must be int32 of shape (S + 1,); got {bounds.dtype} {tuple(bounds.shape)}")
    if text.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q must stand beside one row of packed tokens; got {text.shape[0]} rows")
    if inputs.get("attention_mask") is not None:
        raise ValueError("attention_mask must be None with cu_seq_lens_q: packed rows have no padding")
    row_of = torch.zeros(bounds.shape[0] - 1, dtype=torch.long, device=bounds.device)
    return PackedRows(bounds, row_of, text.shape[1] if longest is None else int(longest))


def packed_positions(bounds: Tensor, tokens: int, first: int) -> Tensor:
    """(1, T) position ids of packed rows: each row counts from `first`."""
    slots = torch.arange(tokens, device=bounds.device)
    row_of = torch.searchsorted(bounds[1:], slots, right=True).clamp(max=bounds.shape[0] - 2)
    return (slots - bounds[row_of] + first)[None]
