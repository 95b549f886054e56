"""The padded batches of a graph runner's step, and what of them can be packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptv2_fast.step.host_batch import INPUTS, pack, why_not_as_padded
from ptv2_fast.step.look import Look
from ptv2_fast.step.packed import OnHost, PackedTask
from ptv2_fast.step.padded import PADDED_INPUTS, pad

_NAMES, _PADDED = frozenset(INPUTS), frozenset(PADDED_INPUTS)


def packed_batches(
    packable: Callable[[Mapping[str, Any], PackedTask], Mapping[str, Any]],
    batches: Sequence[Mapping[str, Tensor]],
    look: Look,
) -> list[OnHost] | str:
    """The batches, each packed; or what they have that packed ones do not.

    Args:
        packable: gives what is packed of a batch.

    Raises:
        ValueError: labels, or a mask, are of another kind or shape than those of the task.
    """
    assert look.task is not None, "asked of what can be packed"
    found: list[OnHost] = []
    for given in batches:
        batch = packable(given, look.task)
        if look.task.is_padded:
            others = {name for name, value in batch.items() if value is not None} - _PADDED
            if others:
                return f"the batch has {', '.join(sorted(others))}"
            found.append(pad(batch))
            continue
        if not _NAMES.issuperset(batch):
            others = {name for name, value in batch.items() if value is not None} - _NAMES
            if others:
                return f"the batch has {', '.join(sorted(others))}"
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() != batch["input_ids"].dim():
            return "attention_mask is not (B, N)"
        labels = batch["labels"]
        # The base's forward settles what its classifier solves by the labels, and takes numbers of other kinds.
        of_numbers = isinstance(labels, Tensor) and labels.is_floating_point()
        if look.task.gives == "row" and (of_numbers != look.task.of_numbers or labels.dtype is torch.float64):
            return f"labels are {labels.dtype}"
        packed = pack(batch, look.task)
        if reason := why_not_as_padded(packed, batch, look.task, look.padding, look.plan.unpad):
            return reason
        found.append(packed)
    return found


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
