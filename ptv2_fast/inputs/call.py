"""What a call says: its inputs read and checked once, for whichever way it then runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ptv2_fast.attention import hook
from ptv2_fast.families.family import Family
from ptv2_fast.inputs.cache import CACHE, cached_tokens, with_cache_name
from ptv2_fast.inputs.features import check_features, reads_text
from ptv2_fast.inputs.sliding_window import check_cached_padding, smallest_window
from ptv2_fast.inputs.text import (
    PackedRows,
    check_beside,
    check_inputs,
    full_mask,
    packed_positions,
    packing_from_cu_seqlens,
    packing_from_positions,
    text_positions,
)


@dataclass(frozen=True)
class TextCall:
    """A call that brings a text.

    Attributes:
        inputs: keyword arguments of the model's forward, none of them None, apart from those that stand here.
        rows, tokens: B and N of the text; what a cache holds in front of it does not count.
        mask: (B, past + N) nonzero at real tokens, (B, 1, N, past + N), whatever else `generate` makes for a static
            cache, or None.
        position_ids: (B or 1, N), the caller's or counted from the boundaries that the caller gives; None where the
            caller says nothing of positions.
        past_length: tokens in the cache; a tensor for a static cache, whose length lives on the device.
        is_first: nothing is cached.
        packing: where the (B, N) tokens are packed rows; None where each row is one text.
    """

    inputs: Mapping[str, Any]
    rows: int
    tokens: int
    mask: Any
    position_ids: Tensor | None
    past_length: int | Tensor
    is_first: bool
    packing: PackedRows | None

    def length(self) -> int | None:
        """How many positions the longest row takes, what is cached included; None where only the device knows."""
        if not isinstance(self.past_length, int):
            return None
        return (self.tokens if self.packing is None else self.packing.longest) + self.past_length

    def positions(self, first: int, offset: int | Tensor, device: torch.device) -> Tensor | None:
        """(B or 1, N) position ids of the text, or None where the model's own are right; see `text_positions`."""
        return text_positions(
            self.position_ids, self.mask,
            rows=self.rows, tokens=self.tokens, past_length=self.past_length, first=first, offset=offset, device=device,
        )  # fmt: skip


@dataclass(frozen=True)
class FeatureCall:
    """A call that brings images or sounds, which have neither padding nor positions of their own.

    Attributes:
        inputs: keyword arguments of the model's forward.
        rows: B.
    """

    inputs: Mapping[str, Any]
    rows: int


@dataclass(frozen=True)
class StackedCall:
    """A call of an encoder-decoder: each stack reads its own text when it is called, by `generate` or by the model.

    Attributes:
        inputs: keyword arguments of the model's forward.
        rows: not known yet.
    """

    inputs: Mapping[str, Any]
    rows: None = None


Call = TextCall | FeatureCall | StackedCall


def named_inputs(inputs: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """Keyword arguments of a forward as the base takes them: without those that are None, the cache under the name that
    transformers has for it, and asking for an output whose parts have names: who asked for a tuple gets one at the end.

    Raises:
        ValueError: the cache is given under both of its names.
    """
    named = with_cache_name({name: value for name, value in inputs.items() if value is not None})
    if named.pop("return_dict", True) is False or not config.return_dict:
        named["return_dict"] = True
    return named


def read_call(
    inputs: Mapping[str, Any], family: Family, base: PreTrainedModel, backbone: PreTrainedModel, *, stacks: bool
) -> Call:
    """Read the inputs of a forward.

    Args:
        inputs: as `named_inputs` gives them.
        family: the backbone's.
        base: the model whose forward it is.
        backbone: the base's.
        stacks: whether it has an encoder and a decoder.

    Raises:
        ValueError: an input is missing, of another shape, type or device than the others ask for, or asks for attention
            weights; the message names it.
    """
    hook.check_served(inputs, backbone.config)
    if stacks:
        return StackedCall(inputs)
    if reads_text(family):
        return read_text(inputs, family, base, backbone)
    checked = check_features(family, inputs, base)
    return FeatureCall(checked, checked[family.reads].shape[0])


def read_text(
    inputs: Mapping[str, Any],
    family: Family,
    base: PreTrainedModel,
    backbone: PreTrainedModel,
    prefix: str = "",
    *,
    mask_of_slots: bool = False,
) -> TextCall:
    """Read the inputs of a forward whose main one is a text.

    Args:
        inputs: its keyword arguments; those that are None are not looked at.
        prefix: stands before the names of inputs in messages.
        mask_of_slots: the mask is of all slots of a cache, filled or not.

    Raises:
        ValueError: as `read_call`.
    """
    others = dict(inputs)
    cache, past_length = others.get(CACHE), cached_tokens(others)
    ids, mask = others.get("input_ids"), others.get("attention_mask")
    if getattr(cache, "is_compileable", False) and smallest_window(backbone):
        mask = full_mask(mask, others.get("position_ids"), past_length, ids)
    rows, tokens = check_inputs(ids, others.get("inputs_embeds"), None if mask_of_slots else mask, past_length, prefix)
    check_beside(others, rows, tokens, base, prefix)
    packing = packing_from_cu_seqlens(others)
    others.pop("attention_mask", None)
    positions = others.pop("position_ids", None)
    if packing is not None and positions is None:
        positions = packed_positions(packing.cu_seqlens, tokens, family.first_position(backbone))
    if packing is None and cache is None:
        packing = packing_from_positions(positions, mask)
    if cache is not None and tokens > 1 and isinstance(mask, Tensor) and mask.dim() == 2:
        check_cached_padding(backbone, mask)
    return TextCall(others, rows, tokens, mask, positions, past_length, cache is None, packing)
