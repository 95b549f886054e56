"""The ways through an encoder-decoder, or its encoder alone: prompts are bound to views of its stacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.adapter import Adapter
from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.backbone.sharded_weights import device_of
from ptv2_fast.forward.bound_prompts import BoundPrompts
from ptv2_fast.forward.gradient_checkpointing import check_checkpointing
from ptv2_fast.forward.row_prompts import RowPrompts
from ptv2_fast.frozen_base import FrozenBase
from ptv2_fast.inputs.cache import CACHE
from ptv2_fast.inputs.call import Call
from ptv2_fast.prompts.placement import stack_offset

_OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "encoder_outputs")


def run_encoder_decoder(
    base: FrozenBase,
    target: PreTrainedModel,
    call: Call,
    rows: RowPrompts,
    *,
    training: bool,
) -> Any:
    """Call `target` with prompts in both stacks.

    Args:
        target: the base, its backbone, or a view of one.

    Raises:
        ValueError: the decoder has a text of its own where a head reads it at the tokens of the encoder's.
    """
    inputs: Mapping[str, Any] = call.inputs
    # What has a head and writes no text classifies; a head over words reads whatever the decoder reads.
    has_classifier = backbone_of(target) is not target and not target.can_generate()
    given = [name for name in _OF_DECODER if name in inputs]
    if given and has_classifier:
        raise ValueError(f"{given[0]} must be None: the head reads the decoder at the tokens of the encoder's text")
    if training:
        check_checkpointing(base)
        if inputs.get(CACHE) is None:
            inputs = {"use_cache": False, **inputs}
    return bind_prompts(base, rows).around(target)(**inputs)


def run_encoder(base: FrozenBase, call: Call, rows: RowPrompts, *, training: bool) -> Any:
    """Call the encoder alone, with its prompts: the decoder does not run.

    Returns:
        The encoder's output, states (B, N, D) of the text's own tokens.

    Raises:
        ValueError: something is given that only a decoder reads.
    """
    given = [name for name in (*_OF_DECODER, CACHE) if name in call.inputs]
    if given:
        raise ValueError(f"{given[0]} must be None: the encoder's states are read, and the decoder does not run")
    if training:
        check_checkpointing(base)
    # Only a decoder keeps a cache, whatever the call or the configuration that both share says of it.
    return bind_prompts(base, rows).encoder()(**{**call.inputs, "use_cache": False})


def bind_prompts(base: FrozenBase, rows: RowPrompts) -> BoundPrompts:
    """The prompts of the rows that are named, for any number of calls."""
    device = device_of(base.backbone)
    virtual = _virtual_tokens(base, rows.adapters[0])
    batch = PromptBatch((), backend=rows.backend) if virtual is not None else rows.batch(base, device)
    offsets = {stack: _offsets(rows, stack, device) for stack in ("encoder", "decoder")}
    return BoundPrompts(base, batch, offsets, virtual, rows.named)


def _virtual_tokens(base: FrozenBase, adapter: Adapter | None) -> Tensor | None:
    """(P, D) the rows' virtual tokens where the first one's prompt is shallow: all rows have the same then."""
    if adapter is None or adapter.config.injection != "shallow":
        return None
    return adapter.encoder().to(base.backbone.dtype)


def _offsets(rows: RowPrompts, stack: str, device: torch.device) -> int | Tensor:
    """How far a stack's positions are shifted; (R,) where the named rows differ."""
    offsets = [0 if adapter is None else stack_offset(adapter.config, stack) for adapter in rows.adapters]
    return offsets[0] if len(set(offsets)) == 1 else torch.tensor(offsets, device=device)
