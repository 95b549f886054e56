"""Names that a PTuningV2Model does not have itself: they are read from the base, and written to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ptv2_fast.inputs.arguments import check_read


class BaseAttributes(nn.Module):
    """What a PTuningV2Model knows of its base's attributes; mixed into it.

    `config`, `generation_config`, `loss_function`, a new `lm_head`: whoever sets one on the wrapper means the model
    that reads it. What the wrapper's own `__init__` or class has stays the wrapper's, and so does what nobody has.
    """

    base_model: PreTrainedModel

    def _own_heads(self) -> Mapping[str, nn.Module]:
        """Modules that run in place of the base's of the same name; a subclass says which."""
        return {}

    def _is_the_bases(self, name: str) -> bool:
        """Whether the base has an attribute and this object has not."""
        parts = self.__dict__
        base = parts.get("_modules", {}).get("base_model")
        # Until __init__ is over, what is set is the wrapper's own; so is whatever is private to it.
        if base is None or "_is_made" not in parts or name.startswith("_"):
            return False
        if name in parts or any(name in parts[kind] for kind in ("_modules", "_parameters", "_buffers")):
            return False
        return not hasattr(type(self), name) and hasattr(base, name)

    def _check_read(self, given: Mapping[str, Any]) -> None:
        """Refuse keyword arguments of a forward that nobody reads; `given` are those without a name in its signature.

        Raises:
            ValueError: the message names one, and the nearest name that is read.
        """
        check_read(given, type(self).forward, self.base_model)

    def __getattr__(self, name: str) -> Any:
        """What this class does not define is the base's: config, device, dtype, generation_config, ..."""
        modules = self.__dict__.get("_modules")
        if modules is not None and name in modules:  # every step asks for the base many times
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the base has and this object has not is set where it is read: on the base.

        Raises:
            ValueError: an adapter trains a copy of the base's module of this name, which would go on running; or the
                base itself is to become something else than a transformers model.
        """
        if name == "base_model" and not isinstance(value, PreTrainedModel):
            raise ValueError(
                f"base_model must be a transformers PreTrainedModel; got {type(value).__name__} (what wraps a model, "
                "torch.compile for instance, is given the PTuningV2Model)"
            )
        if not self._is_the_bases(name):
            super().__setattr__(name, value)
            return
        if name in self._own_heads():
            raise ValueError(
                f"{name} must be set in the adapter that trains a copy of it: "
                f"model.adapters[name].base_heads[{name!r}] = ..."
            )
        setattr(self.base_model, name, value)
