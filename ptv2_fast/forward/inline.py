"""The inline way: shallow prompts on a bidirectional model are virtual tokens, rows of the batch before the text."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.adapter import Adapter
from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.backbone.sharded_weights import device_of
from ptv2_fast.backbone.view import outside_graphs
from ptv2_fast.forward.gradient_checkpointing import check_checkpointing
from ptv2_fast.forward.row_prompts import new_account
from ptv2_fast.forward.views import ViewsOfCall, prompted
from ptv2_fast.frozen_base import FrozenBase
from ptv2_fast.inputs.call import Call, TextCall
from ptv2_fast.inputs.max_length import check_length


def run_inline(base: FrozenBase, target: PreTrainedModel, call: Call, adapter: Adapter, *, training: bool) -> Any:
    """Call `target` with virtual tokens in front of every row; its outputs have the text's own rows.

    Args:
        target: the base, its backbone, or a view of one.
        adapter: the one of all rows.

    Raises:
        ValueError: the call is packed, has a mask of more than rows, or leaves no room for the virtual tokens.
    """
    if not isinstance(call, TextCall):
        # Theirs enter with the first layer, beside what a recomputation of it tracks; those of a text with its words.
        if training:
            check_checkpointing(base)
        inputs = dict(call.inputs)
    else:
        inputs = _behind_virtual_tokens(base, call, adapter.config.num_virtual_tokens)
    virtual = adapter.encoder().to(base.backbone.dtype)
    prompts = PromptBatch(layers=(), backend=adapter.config.backend, asked=new_account())
    inputs["ptv2_prompts"] = prompts
    output = _view(base, target, prompts, virtual)(**inputs)
    base.check_reached(prompts)
    if isinstance(call, TextCall) and getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(states[:, -call.tokens :] for states in output.hidden_states)
    return output


def _behind_virtual_tokens(base: FrozenBase, call: TextCall, length: int) -> dict[str, Any]:
    """A text's keyword arguments, with positions that leave room for `length` virtual tokens."""
    check_length(base.backbone, base.family, call.tokens + length)
    if call.packing is not None:
        raise ValueError(
            "position_ids and cu_seq_lens_q must not pack rows with a shallow prompt on a bidirectional model"
        )
    if call.mask is not None and call.mask.dim() != 2:
        raise ValueError(f"attention_mask must have shape (B, N) with a shallow prompt; got {call.mask.shape}")
    positions = call.positions(base.family.first_position(base.backbone), length, device_of(base.backbone))
    inputs = {**call.inputs, "position_ids": positions}
    return inputs if call.mask is None else {**inputs, "attention_mask": call.mask}


@outside_graphs
def _view(base: FrozenBase, target: PreTrainedModel, prompts: PromptBatch, virtual: Tensor) -> PreTrainedModel:
    """What the call runs."""
    return prompted(target, backbone_of(target), ViewsOfCall(base, prompts, virtual))
