"""A view of a model: the same weights under another forward or with other children, the model itself untouched."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping

from torch import nn


def view_of(
    module: nn.Module,
    *,
    children: Mapping[str, nn.Module] | None = None,
    forward: Callable | None = None,
) -> nn.Module:
    """A second module object over the parameters, buffers and children of `module`.

    Args:
        module: the module to look at; it is not changed.
        children: direct children that the view has instead of the module's own.
        forward: called as forward(original_forward, *args, **kwargs) in place of the module's
            forward.

    Returns:
        A module of a subclass of type(module), with the same class name and forward signature.
    """
    view = copy.copy(module)
    view._modules = {**module._modules, **(children or {})}
    if forward is not None:
        view.__class__ = _class_with_forward(type(module))
        view._view_forward = forward
    return view


@functools.cache
def _class_with_forward(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` whose forward goes through the instance's `_view_forward`."""

    # Generation reads the signature of forward, which wraps() carries over.
    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        return self._view_forward(functools.partial(cls.forward, self), *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
