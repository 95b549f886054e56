"""A mypy plugin: an attribute that `torch.nn.Module` declares nowhere is Any, not `Tensor | Module`.

torch types `Module.__getattr__` as `Tensor | Module`. The frozen models' attributes (`config`, `encoder.layer`, ...)
are neither in most places, and their classes differ by family, so the union can only be cast away wherever it is
touched. Attributes that a class does declare keep their types.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type

_MODULE = "torch.nn.modules.module.Module"
_UNDECLARED = {"torch._tensor.Tensor", _MODULE}


def _undeclared_is_any(context: AttributeContext) -> Type:
    given = get_proper_type(context.default_attr_type)
    if isinstance(given, UnionType):
        members = {getattr(getattr(get_proper_type(item), "type", None), "fullname", "") for item in given.items}
        if members == _UNDECLARED:
            return AnyType(TypeOfAny.special_form)
    return context.default_attr_type


class ModuleAttributes(Plugin):
    """Looks at every attribute that is read from a module."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _undeclared_is_any if fullname.startswith(f"{_MODULE}.") else None


def plugin(version: str) -> type[Plugin]:
    """What mypy calls."""
    return ModuleAttributes
