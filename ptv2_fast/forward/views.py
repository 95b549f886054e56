"""The views through which a call runs the backbone: what lies over what, and why in that order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.backbone.locate import with_backbone
from ptv2_fast.backbone.own_attention import given_prompts
from ptv2_fast.frozen_base import FrozenBase
from ptv2_fast.inputs.right_padding import with_right_padding
from ptv2_fast.step.options import StepPlan
from ptv2_fast.step.unpad import Packing, unpadded, zero_at_padding


@dataclass(frozen=True)
class LayersOfStep:
    """How a step runs the layers.

    Attributes:
        plan: which savings are on.
        stand_ins: path -> what stands in for a linear map there.
        read: (R,) the tokens of the flattened rows, as the layers run them, whose last states are read; None for all.
    """

    plan: StepPlan
    stand_ins: Mapping[str, nn.Module]
    read: Tensor | None


@dataclass(frozen=True)
class ViewsOfCall:
    """What the views of one call are made for.

    Attributes:
        base: the frozen base.
        prompts: the prompts among the call's inputs.
        virtual: (P, D) virtual tokens that are rows in front of the text; None where prompts are keys and values.
        layers: how the layers run; None for as they are.
        packing: where the real tokens stand, if padding is dropped.
        zeroed: the mask (B, N), if layers run padding too and outputs are zero there as if it had been dropped.
    """

    base: FrozenBase
    prompts: PromptBatch
    virtual: Tensor | None = None
    layers: LayersOfStep | None = None
    packing: Packing | None = None
    zeroed: Tensor | None = None


def _with_hooked_attention(backbone: PreTrainedModel, call: ViewsOfCall) -> PreTrainedModel:
    return call.base.hooked.attention(backbone)


def _with_layer_index(backbone: PreTrainedModel, call: ViewsOfCall) -> PreTrainedModel:
    # A batch without keys and values has none to tell apart; attention of the family's own is hooked by this view.
    needless = call.virtual is not None and not call.base.family.own_attention
    return backbone if needless else call.base.hooked.with_layer_index(backbone)


def _with_virtual_tokens(backbone: PreTrainedModel, call: ViewsOfCall) -> PreTrainedModel:
    return backbone if call.virtual is None else call.base.family.shallow_view(backbone, call.virtual)


def _with_layers_of_step(backbone: PreTrainedModel, call: ViewsOfCall) -> PreTrainedModel:
    step = call.layers
    return backbone if step is None else call.base.layers.view(backbone, step.plan, step.stand_ins, step.read)


def _with_right_padding(backbone: PreTrainedModel, call: ViewsOfCall) -> PreTrainedModel:
    return with_right_padding(backbone) if call.base.family.absolute_positions else backbone


def _without_padding(backbone: PreTrainedModel, call: ViewsOfCall) -> PreTrainedModel:
    if call.packing is not None:
        return unpadded(backbone, call.packing)
    return backbone if call.zeroed is None else zero_at_padding(backbone, call.zeroed)


def _given_prompts(backbone: PreTrainedModel, call: ViewsOfCall) -> PreTrainedModel:
    return given_prompts(backbone, call.prompts) if call.base.family.own_attention else backbone


def _with_own_pooler(backbone: PreTrainedModel, call: ViewsOfCall) -> PreTrainedModel:
    return call.base.family.with_own_pooler(backbone)


# From the innermost outwards: each is a view of the one before it, or that one itself where it has nothing to do.
VIEWS: tuple[Callable[[PreTrainedModel, ViewsOfCall], PreTrainedModel], ...] = (
    _with_hooked_attention,  # innermost: the model's own modules read prompts
    _with_layer_index,  # of those very modules, so that both views are kept from call to call
    _with_virtual_tokens,  # below whatever moves rows or tokens: that knows the text's own alone
    _with_layers_of_step,  # of layers that are hooked and know which one they are
    _with_right_padding,  # around all layers: they count slots, and outputs stand where the call has its tokens
    _without_padding,  # the same where no slot counts: layers run real tokens, outputs stand in the padded batch
    _given_prompts,  # around what reads the prompts below: the head of such a model hands none on to its backbone
    _with_own_pooler,  # outermost: it reads the rows as the caller gave them
)


def prompted(target: PreTrainedModel, backbone: PreTrainedModel, call: ViewsOfCall) -> PreTrainedModel:
    """A view of `target` whose backbone runs through every view of the call.

    Args:
        target: a base, its backbone, or a view of one; its backbone is `backbone`.
    """
    view = backbone
    for make in VIEWS:
        view = make(view, call)
    return target if view is backbone else with_backbone(target, view)
