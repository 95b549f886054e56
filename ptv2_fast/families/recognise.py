"""Families that nobody listed: taken for one that is listed where the model itself proves that it is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.attention.prompt_batch import LayerPrompt, PromptBatch
from ptv2_fast.backbone.hooked import attention_view
from ptv2_fast.backbone.view import in_eval

if TYPE_CHECKING:
    from ptv2_fast.families.family import Family

_FRONT, _BACK = 4, 3  # tokens of the two halves of the text that a trial reads
# How far two ways to the same numbers may lie apart, ||a - b|| / ||b||.
_ALIKE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_recognised: WeakKeyDictionary[PreTrainedModel, Family] = WeakKeyDictionary()


def recognise(backbone: PreTrainedModel, listed: Mapping[str, Family]) -> Family | None:
    """The listed family that a backbone behaves like, by trial on a few tokens; None where it is like none of them.

    A family passes that makes, of what enters each layer, the very keys and values that the layer itself makes; and,
    where text cannot see ahead, if the front of a text given as a prompt does to the rest what the front itself does.
    So norms, projections, rotations, positions and the mask are the family's. Costs a few small forwards, once.

    Args:
        backbone: on a device, with weights.
        listed: the families to try, by name.
    """
    if why_not_tried(backbone) is not None:
        return None
    known: list[Family] = []
    for family in listed.values():
        if family not in known:  # some cannot be hashed: a dataclass that somebody registered
            known.append(family)
    if _recognised.get(backbone) not in known:
        hooked = attention_view(backbone)
        if hooked is None:
            return None
        view = in_eval(hooked)
        found = next((family for family in known if _is_like(view, family)), None)
        if found is None:
            return None
        _recognised[backbone] = found
    return _recognised[backbone]


def why_not_tried(backbone: PreTrainedModel) -> str | None:
    """Why a backbone of a model type that is not listed is not compared with the listed ones; None where it is."""
    if getattr(backbone.config, "is_encoder_decoder", False):
        return "an encoder-decoder must be of a listed family itself"
    if backbone.main_input_name != "input_ids":
        return f"what it reads is {backbone.main_input_name} and no text"
    if backbone.device.type == "meta":
        return "it has no weights"
    if backbone.dtype not in _ALIKE:
        return f"its weights are {backbone.dtype}"
    return None


@torch.no_grad()
def why_unlike(backbone: PreTrainedModel) -> str | None:
    """What keeps a backbone that was tried from being like any family; None where it is its keys and values."""
    hooked = attention_view(backbone)
    if hooked is None:
        return "its attention does not run through transformers' attention interface"
    try:
        _, record = _run(in_eval(hooked), _text(backbone), None, PromptBatch(layers=()))
    except Exception:  # a model that nobody knows may raise anything
        return None
    return None if record else "it does not hand keyword arguments on to its attention"


@torch.no_grad()
def _is_like(backbone: PreTrainedModel, family: Family) -> bool:
    try:
        if family.own_attention or family.layer_index is not None or family.absolute_positions:
            return False
        family.check(backbone)
        layers = family.sizes(backbone).num_layers
        if len(family.layers(backbone)) != layers:
            return False
        text = _text(backbone)
        start = -_FRONT if family.rotary else family.first_position(backbone)
        whole, record = _run(backbone, text, start, PromptBatch(layers=()))
        if len(record) != layers or not _makes_its_keys(backbone, family, whole.hidden_states, record):
            return False
        return _positions_fit(backbone, family, text) and _front_is_a_prompt(backbone, family, text, whole, record)
    except Exception:  # whatever the methods of a family, of which anybody may register one, raise on another build
        return False


def _text(backbone: PreTrainedModel) -> Tensor:
    """Token ids (1, n), all different and none of them padding, from which some families count positions."""
    ids = [i for i in range(_FRONT + _BACK + 1) if i != backbone.config.pad_token_id]
    return torch.tensor([ids[: _FRONT + _BACK]], device=backbone.device)


def _run(backbone: PreTrainedModel, text: Tensor, start: int | None, prompts: PromptBatch) -> tuple[Any, list]:
    """The backbone's output for token ids (1, n) at positions from `start`, and every layer's keys and values.

    Without a start they stand where the backbone itself puts them.
    """
    record: list[tuple[Tensor, Tensor]] = []
    given = {}
    if start is not None:
        given["position_ids"] = torch.arange(start, start + text.shape[1], device=text.device)[None]
    output = backbone(
        input_ids=text, attention_mask=torch.ones_like(text), use_cache=False, **given,
        output_hidden_states=True, return_dict=True, ptv2_record=record, ptv2_prompts=prompts,
    )  # fmt: skip
    return output, record


def _makes_its_keys(
    backbone: PreTrainedModel, family: Family, states: Tensor, record: Sequence[tuple[Tensor, Tensor]]
) -> bool:
    """Whether the family makes each layer's keys and values (1, Hkv, n, d) of the front's states (1, n, D)."""
    sizes = family.sizes(backbone)
    for layer, (keys, values) in enumerate(record):
        if (keys.shape[1], keys.shape[3]) != (sizes.num_kv_heads, sizes.head_dim):
            return False
        # The front alone stands at the positions of a prompt.
        normed = family.attention_input(backbone, layer, states[layer][0, :_FRONT])
        made_keys, made_values = (project(normed) for project in family.projections(backbone, layer))
        made_keys = made_keys.unflatten(-1, (-1, keys.shape[-1]))
        made_keys = family.finish_keys(backbone, layer, made_keys).transpose(0, 1)
        made_values = made_values.unflatten(-1, (-1, values.shape[-1])).transpose(0, 1)
        if not _alike(made_keys, keys[0, :, :_FRONT]) or not _alike(made_values, values[0, :, :_FRONT]):
            return False
    return True


def _positions_fit(backbone: PreTrainedModel, family: Family, text: Tensor) -> bool:
    """Whether texts start where the family says, and differences of positions count alone if it is a rotary one."""
    first = family.first_position(backbone)
    own, here, there = (
        _run(backbone, text, start, PromptBatch(layers=()))[0].last_hidden_state for start in (None, first, first + 5)
    )
    return _alike(here, own) and _alike(there, here) == family.rotary


def _front_is_a_prompt(
    backbone: PreTrainedModel, family: Family, text: Tensor, whole: Any, record: Sequence[tuple[Tensor, Tensor]]
) -> bool:
    """Whether the text's back, with the front's keys and values as its prompt, is as in the whole text."""
    changed = text.clone()
    changed[0, -1] = text[0, 0]
    start = -_FRONT if family.rotary else family.first_position(backbone)
    front = whole.last_hidden_state[:, :_FRONT]
    ahead = _run(backbone, changed, start, PromptBatch(layers=()))[0].last_hidden_state[:, :_FRONT]
    if _alike(ahead, front) != family.causal:
        return False
    if not family.causal:
        return True
    layers = tuple(LayerPrompt(k[0, :, :_FRONT], v[0, :, :_FRONT]) for k, v in record)
    back, _ = _run(backbone, text[:, _FRONT:], start + _FRONT, PromptBatch(layers=layers))
    return _alike(back.last_hidden_state, whole.last_hidden_state[:, _FRONT:])


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(error) < _ALIKE[expected.dtype]
