"""What captured steps read and write by its address: gradients, learning rates, the optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Of an optimizer's group: what an update finds by its address, or never reads.
_NOT_SETTINGS = ("params", "lr", "initial_lr")


class HeldGradients:
    """The gradients that passes add to, at the same addresses as long as this lives."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the gradients that are there, those that an eager step has just made."""
        own = trained_by(optimizer)
        ids = {id(parameter) for parameter in own}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
        self._own = [(p, p.grad) for p in own if p.grad is not None]
        # A captured pass adds to these too, so their memory must not be given back either.
        self._others = [(p, p.grad) for p in others if p.grad is not None]
        self._without = [p for p in own if p.grad is None]

    def begin(self) -> bool:
        """Bring the gradients of the optimizer's parameters to zero, for a step to add to.

        Returns:
            whether somebody had put something else in the place of one.
        """
        replaced = self.put_back()
        if self._own:
            torch._foreach_zero_([gradient for _, gradient in self._own])
        for parameter in self._without:
            parameter.grad = None
        return replaced

    def put_back(self) -> bool:
        """Every held gradient is its parameter's again, as it is; gives whether one was not."""
        replaced = False
        for parameter, gradient in self._own:
            if parameter.grad is not gradient:
                parameter.grad, replaced = gradient, True
        for parameter, gradient in self._others:
            if parameter.grad is not gradient:
                # Nobody else brings these to zero: whoever took one away wanted to begin anew.
                parameter.grad, replaced = gradient.zero_(), True
        return replaced


class HeldOptimizer:
    """An optimizer whose learning rates and step counts a captured update finds on the device."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, capturable: bool) -> None:
        """Prepare nothing yet.

        Args:
            capturable: tell the optimizer that it is captured.
        """
        self._optimizer = optimizer
        self._device = device
        self._capturable = capturable
        self._rates: list[Tensor] = []
        self._state: list[Any] = []
        self._settings: list[Any] = []

    def hold(self) -> str | None:
        """Learning rates and step counts at the same addresses, whatever a scheduler or a loaded state wrote.

        Returns:
            why an update captured before would be wrong now; None where it would not.
        """
        groups = self._optimizer.param_groups
        reason = None
        if len(self._rates) != len(groups):
            self._rates = [torch.zeros((), dtype=torch.float32, device=self._device) for _ in groups]
            reason = "the optimizer has other groups"
        for group, rate in zip(groups, self._rates):
            if self._capturable:
                group["capturable"] = True
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate
        for state in self._optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(self._device)
        # The tensors themselves, not their ids: those of freed ones come back.
        state = [value for state in self._optimizer.state.values() for value in state.values()]
        settings = [_setting(v) for group in groups for name, v in group.items() if name not in _NOT_SETTINGS]
        if not same(state, self._state):
            reason = "the optimizer's state was replaced"
        elif settings != self._settings:
            reason = "the optimizer's settings changed"
        self._state, self._settings = state, settings
        return reason


class HeldModel:
    """Where captured passes find a model: its modules by name, and the addresses of weights and buffers."""

    def __init__(self, model: nn.Module) -> None:
        """Note where everything is found."""
        # Kept alive, so that no other module can have the id of one.
        self._modules = modules = list(model.modules())
        self._children = [(m._modules, name) for m in modules for name in m._modules]
        self._weights = [
            (m._parameters, name) for m in modules for name, p in m._parameters.items() if type(p) is nn.Parameter
        ]
        self._buffers = [(m._buffers, name) for m in modules for name, b in m._buffers.items() if type(b) is Tensor]

    def state(self) -> dict[str, object]:
        """What passes rely on, by what to say if it changes."""
        weights = [place.get(name) for place, name in self._weights]
        buffers = [place.get(name) for place, name in self._buffers]
        return {
            "a module was replaced": [id(place.get(name)) for place, name in self._children],
            "weights were moved, cast or replaced": [None if p is None else p.data_ptr() for p in weights],
            "buffers were moved, cast or replaced": [None if b is None else b.data_ptr() for b in buffers],
            # Those of another optimizer, or of none: a captured pass computes the gradients that it was captured with.
            "other parameters train": [p is not None and p.requires_grad for p in weights],
        }


def trained_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two sequences hold the very same objects."""
    return len(left) == len(right) and all(a is b for a, b in zip(left, right))


def _setting(value: Any) -> Any:
    """Something that compares without waiting for the device."""
    if isinstance(value, tuple):
        return tuple(map(_setting, value))
    return id(value) if isinstance(value, Tensor) else value
