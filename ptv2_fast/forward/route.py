"""Which way a call runs."""

from __future__ import annotations

from enum import Enum

from transformers import PreTrainedModel

from ptv2_fast.forward.row_prompts import RowPrompts
from ptv2_fast.frozen_base import FrozenBase
from ptv2_fast.prompts.placement import is_inline


class Route(Enum):
    """The ways through a frozen base; each has a file of its own here."""

    PLAIN = "plain"  # prompts are keys and values inside attention, or nothing at all
    INLINE = "inline"  # virtual tokens are rows of the batch, in front of the text
    ENCODER_DECODER = "encoder_decoder"  # two stacks, each with prompts of its own
    ENCODER = "encoder"  # the first of them alone, whose states heads read


def route_of(base: FrozenBase, rows: RowPrompts, target: PreTrainedModel | None = None) -> Route:
    """The way of a call's rows, which all go the same one.

    Args:
        target: what is called; None is the base.

    Raises:
        ValueError: virtual tokens that are rows of the batch are asked for beside other adapters.
    """
    stacks = base.sizes.decoder_layers > 0
    inline = False
    for adapter in set(rows.adapters):
        inline = inline or (adapter is not None and is_inline(adapter.config, base.family))
    if inline and len(rows.adapters) > 1:
        kind = "an encoder-decoder" if stacks else "a bidirectional model"
        raise ValueError(
            f"adapter_names must not mix a shallow prompt on {kind} with other adapters: its virtual tokens are rows "
            f"of the batch; got {sorted(set(rows.names))}"
        )
    if stacks:
        return Route.ENCODER if target is base.backbone.encoder else Route.ENCODER_DECODER
    return Route.INLINE if inline else Route.PLAIN
