"""Norms of several layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptv2_fast.backbone.view import view_of


def normed_together(norms: Sequence[nn.Module], states: Tensor) -> Tensor | None:
    """What norms make of their states (L, ..., D), each of its own; None where they have to run one by one.

    transformers' norms by the root mean square are code that multiplies by their weight element by element: with
    weights (L, 1, ..., D) it is that of all layers. Nothing else is taken for it, nor what somebody hooks or replaces.
    """
    first = norms[0]
    kind = type(first)
    if not kind.__module__.startswith("transformers.models.") or not kind.__name__.endswith("RMSNorm"):
        return None
    if any(type(norm) is not kind or not _is_plain(norm) or _epsilon(norm) != _epsilon(first) for norm in norms):
        return None
    weights = [norm._parameters["weight"] for norm in norms]
    if any(weight is None or weight.dtype != states.dtype or weight.device != states.device for weight in weights):
        return None
    weight = torch.stack(weights).view(len(norms), *(1,) * (states.dim() - 2), -1)  # type: ignore[arg-type]
    made: Tensor = view_of(first, attributes={"_parameters": {"weight": weight}}).forward(states)
    return made


def _is_plain(norm: nn.Module) -> bool:
    """Whether the code of a norm's class and its weight are all that there is to it."""
    hooked = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return not hooked and "forward" not in norm.__dict__ and list(norm._parameters) == ["weight"]


def _epsilon(norm: nn.Module) -> float | None:
    own = norm.__dict__
    epsilon: float | None = own.get("variance_epsilon", own.get("eps"))
    return epsilon
