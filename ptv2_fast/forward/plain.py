"""The plain way: prompts are keys and values inside attention, and every output has the text's own rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.backbone.sharded_weights import device_of
from ptv2_fast.backbone.view import outside_graphs
from ptv2_fast.forward.gradient_checkpointing import check_checkpointing
from ptv2_fast.forward.row_prompts import ReadyPrompts, RowPrompts
from ptv2_fast.forward.views import LayersOfStep, ViewsOfCall, prompted
from ptv2_fast.frozen_base import FrozenBase
from ptv2_fast.inputs.call import Call, TextCall
from ptv2_fast.inputs.max_length import check_length
from ptv2_fast.inputs.sliding_window import counts_padding
from ptv2_fast.step.labelled_rows import balances_experts
from ptv2_fast.step.options import StepPlan
from ptv2_fast.step.unpad import Packing, can_unpad


def run_plain(
    base: FrozenBase,
    target: PreTrainedModel,
    call: Call,
    rows: RowPrompts | ReadyPrompts,
    plan: StepPlan,
    *,
    training: bool,
    read: Tensor | None = None,
) -> Any:
    """Call `target` with each row's prompts beside its text.

    Args:
        target: the base, its backbone, or a view of one.
        plan: what the step leaves out.
        read: (R,) the tokens of the flattened (B, N) whose last states the caller reads; None for all.

    Raises:
        ValueError: the text does not fit beside its prompts.
    """
    if training:
        check_checkpointing(base)
    device = device_of(base.backbone)
    inputs = _beside_prompts(base, call, rows, device)
    # Weights move here, before anything takes their address.
    stand_ins = base.layers.stand_ins(plan)
    prompts = rows.batch(base, device, call.packing if isinstance(call, TextCall) else None)
    inputs["ptv2_prompts"] = prompts
    if training and isinstance(call, TextCall) and call.is_first:
        inputs.setdefault("use_cache", False)
    output = _view(base, target, inputs, LayersOfStep(plan, stand_ins, read))(**inputs)
    base.check_reached(prompts)
    return output


def _beside_prompts(
    base: FrozenBase, call: Call, rows: RowPrompts | ReadyPrompts, device: torch.device
) -> dict[str, Any]:
    """The call's keyword arguments, with the positions that a text has beside its rows' prompts.

    Raises:
        ValueError: the text is too long for them.
    """
    if not isinstance(call, TextCall):
        return dict(call.inputs)
    offsets = rows.offsets(base)
    length = call.length()
    if length is not None:
        check_length(base.backbone, base.family, length + max(offsets))
    offset = offsets[0] if len(offsets) == 1 else torch.tensor(offsets, device=device)[:, None]
    positions = call.positions(base.family.first_position(base.backbone), offset, device)
    mask = call.mask
    if mask is None and positions is not None and call.is_first:
        # With a mask at hand transformers does not look for packed rows itself.
        mask = torch.ones(call.rows, call.tokens, dtype=torch.bool, device=device)
    inputs = dict(call.inputs)
    if mask is not None:
        inputs["attention_mask"] = mask
    if positions is not None:
        inputs["position_ids"] = positions
    return inputs


@outside_graphs
def _view(base: FrozenBase, target: PreTrainedModel, inputs: Mapping[str, Any], step: LayersOfStep) -> PreTrainedModel:
    """What the call runs: `target`, with its backbone as the step's plan says.

    Args:
        inputs: the keyword arguments that it is called with.
    """
    backbone, read = backbone_of(target), step.read
    packing, zeroed = _padding(base, backbone, inputs, step.plan)
    if inputs.get("output_hidden_states") or backbone.config.output_hidden_states:
        read = None
    if packing is not None and read is not None:
        read = packing.places(read)
    layers = LayersOfStep(step.plan, step.stand_ins, read)
    views = ViewsOfCall(base, inputs["ptv2_prompts"], layers=layers, packing=packing, zeroed=zeroed)
    return prompted(target, backbone, views)


def _padding(
    base: FrozenBase, backbone: PreTrainedModel, inputs: Mapping[str, Any], plan: StepPlan
) -> tuple[Packing | None, Tensor | None]:
    """Where the call's real tokens stand, if its padding is dropped; its mask, if only outputs are to be zero there."""
    # A loss over the routers' logits reads them for the padded batch.
    if not can_unpad(inputs) or base.family.absolute_positions or balances_experts(base.model, inputs):
        return None, None
    mask = inputs["attention_mask"]
    if plan.unpads(mask, base.sizes.hidden_size) or counts_padding(backbone, mask):
        return Packing.of_padded(mask), None
    # How much padding a batch has must not decide what a loss or a pooler finds there.
    return None, mask if plan.unpad and 0 < int(mask.count_nonzero()) < mask.numel() else None
