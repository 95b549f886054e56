"""Who watches or changes what runs inside a forward: it would see nothing of a replay, or could not be captured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import contains
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers.utils import output_capturing


class Observers:
    """Hooks of modules and parameters, and forwards put in the place of a module's own.

    Asked in every step: each question is a few calls, however many modules there are.
    """

    def __init__(self, modules: Iterable[nn.Module], trained: Sequence[Tensor]) -> None:
        """Note where hooks would be found.

        Args:
            modules: what a pass runs.
            trained: the parameters whose gradients it computes.
        """
        self._trained = trained
        every = list(modules)
        self._own = [module.__dict__ for module in every]
        self._hooks: list[Any] = []
        for module in every:
            self._hooks += [
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            ]

    def found(self) -> str | None:
        """Who there is; None where there is nobody."""
        if any(self._hooks) and not all(map(_is_of_transformers, self._hooks)):
            return "a module of the base or the adapter has hooks"
        if any(map(contains, self._own, repeat("forward"))):
            return "a module of the base has another forward than its class"
        if any(parameter._backward_hooks for parameter in self._trained):
            return "a trained parameter has hooks"
        return None


def autocast_of(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast that is on around this call; None where none is."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def why_not_now(device: torch.device) -> str | None:
    """What goes on around this call that a replay would not take part in; None where nothing does."""
    if nn.modules.module._has_any_global_hook():
        return "there are hooks of all modules"
    if torch._C._len_torch_dispatch_stack():
        return "a mode watches every operation"
    if any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()):
        return "a mode watches every function"
    if forward_ad._current_level >= 0:
        return "derivatives are taken forwards"
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return "the call is transformed or traced"
    if parametrize._cache_enabled:
        return "parametrized weights are cached"
    if torch.is_anomaly_enabled():
        return "anomalies are detected"
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "what is saved for backward has hooks, as of a checkpoint around the model"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "somebody else captures the call"
    return None


def _is_of_transformers(hooks: Any) -> bool:
    """Whether hooks only collect the outputs that a call asks for; one that asks is not captured."""
    return all(getattr(hook, "__module__", None) == output_capturing.__name__ for hook in hooks.values())
