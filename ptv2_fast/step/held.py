"""What captured steps read and write by its address: gradients, learning rates, the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_WITH_ADDRESS = (nn.Parameter, Tensor)
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
        self._zeroed = [gradient for _, gradient in self._own]

    @property
    def has_others(self) -> bool:
        """Whether passes add to gradients of parameters that the optimizer does not have."""
        return bool(self._others)

    def begin(self) -> bool:
        """Bring the gradients of the optimizer's parameters to zero, for a step to add to.

        Returns:
            whether somebody had put something else in the place of one.
        """
        replaced = self.put_back()
        if self._zeroed:
            torch._foreach_zero_(self._zeroed)
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
        for group, rate in zip(groups, self._rates, strict=True):
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


class HeldModules:
    """Where captured passes find modules: by their names, the addresses of weights and buffers, who trains, and the
    settings that modules compute with: a captured pass keeps them as they were.

    Looked at in every step while the device has nothing to do: a few comparisons of whole lists and dictionaries.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note where everything is found; what is found by its identity is kept alive."""
        modules = list(model.modules())
        self._children = [m._modules for m in modules if m._modules]
        self._noted_children = [dict(children) for children in self._children]
        self._weights = _Places([m._parameters for m in modules])
        self._buffers = _Places([m._buffers for m in modules])
        self._addresses = self._weights.addresses(), self._buffers.addresses()
        found = [(m.__dict__, name) for m in modules for name in m.__dict__ if _is_setting(m, name)]
        self._owners, self._names = [own for own, _ in found], [name for _, name in found]
        self._noted_settings = self._all_settings()
        self._flags = self._weights.flags()

    def changed(self) -> str | None:
        """What a pass would be wrong without, if it is not what it was; None where it is."""
        if self._children != self._noted_children:
            return "a module was replaced"
        if self._weights.addresses() != self._addresses[0]:
            return "weights were moved, cast or replaced"
        if self._buffers.addresses() != self._addresses[1]:
            return "buffers were moved, cast or replaced"
        if self._all_settings() != self._noted_settings:
            return "modules train, drop or scale otherwise, or have other settings"
        return None

    def _all_settings(self) -> list[Any]:
        """Of every module whether it trains, how much it drops, and what else it computes with that is no tensor."""
        return [*map(dict.get, self._owners, self._names)]

    def others_changed(self) -> str | None:
        """Whether parameters of another optimizer, or of none, train or do not as they did not or did.

        A captured pass computes the gradients that it was captured with. Its loss, and the gradients of the
        optimizer's own parameters, are right all the same.
        """
        return "other parameters train" if self._weights.flags() != self._flags else None


class HeldModel(HeldModules):
    """A model as captured steps of an optimizer find it: its modules, and the parameters that the optimizer has."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Note where everything is found."""
        super().__init__(model)
        self._optimizer = optimizer
        # Kept alive, so that nothing else can take their place.
        self._trained = trained_by(optimizer)
        self._train = _flags(self._trained)

    def changed(self) -> str | None:
        """What a pass would be wrong without, if it is not what it was; None where it is."""
        trained = trained_by(self._optimizer)
        if not same(trained, self._trained) or _flags(trained) != self._train:
            return "the optimizer trains other parameters"
        return super().changed()


class _Places:
    """Where modules have their tensors, each found by its name at every look."""

    def __init__(self, dictionaries: Sequence[Mapping[str, Any]]) -> None:
        """Find them, those that `functional_call` has put in place too; of a subclass what it is made of."""
        places = [(one, name, tensor) for one in dictionaries for name, tensor in one.items()]
        found = [(one, name) for one, name, tensor in places if type(tensor) in _WITH_ADDRESS]
        self._dictionaries, self._names = [one for one, _ in found], [name for _, name in found]
        self._made = [(one, name) for one, name, tensor in places if is_traceable_wrapper_subclass(tensor)]

    def addresses(self) -> list[int] | None:
        """Of each; None where one is gone, or is of a kind now that has none."""
        try:
            found = list(map(Tensor.data_ptr, map(getitem, self._dictionaries, self._names)))
            if self._made:
                found += [_address(part) for place, name in self._made for part in _parts(place[name])]
            return found
        except (KeyError, TypeError, RuntimeError):
            return None

    def flags(self) -> list[bool]:
        """Which of them train."""
        return [place[name].requires_grad for place, name in zip(self._dictionaries, self._names, strict=True)]


def _parts(tensor: Any) -> list[Any]:
    """The tensors that one of a subclass (torchao's, a shard) is made of; any other is its own part."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names = tensor.__tensor_flatten__()[0]
    return [part for name in names for part in _parts(getattr(tensor, name))]


def _address(tensor: Tensor) -> int:
    """Where a tensor is; 0 for all without memory of their own."""
    return tensor.data_ptr() if torch._C._has_storage(tensor) else 0


def _is_setting(module: nn.Module, name: str) -> bool:
    """Whether an attribute of a module is something that people change and a captured pass keeps.

    Those of transformers have whole numbers, switches and words among them: how many experts a token goes to. Elsewhere
    they are sizes, or count calls.
    """
    value = module.__dict__[name]
    if type(module).__module__.startswith("transformers.") and not name.startswith("_"):
        return isinstance(value, (bool, int, float, str))
    return type(value) is float or (name in ("training", "p") or "drop" in name) and isinstance(value, (bool, int))


def _flags(parameters: Sequence[nn.Parameter]) -> list[bool]:
    return [parameter.requires_grad for parameter in parameters]


def trained_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_gradients(optimizer: torch.optim.Optimizer, adapter: str) -> None:
    """Refuse a step that would update nothing.

    Args:
        adapter: the name of the active adapter, whose loss has been differentiated.

    Raises:
        ValueError: none of the optimizer's parameters has a gradient.
    """
    if all(parameter.grad is None for parameter in trained_by(optimizer)):
        raise ValueError(
            f"optimizer must have parameters that train with the active adapter {adapter!r}; got none: after "
            "set_adapter() another GraphRunner is needed, with an optimizer over that adapter's parameters"
        )


def same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two sequences hold the very same objects."""
    return len(left) == len(right) and all(map(is_, left, right))


def _setting(value: Any) -> Any:
    """Something that compares without waiting for the device."""
    if isinstance(value, tuple):
        return tuple(map(_setting, value))
    return id(value) if isinstance(value, Tensor) else value
