"""A view of a model: the same weights under another forward or with other children; the model itself is untouched."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

M = TypeVar("M", bound=nn.Module)
F = TypeVar("F", bound=Callable[..., Any])

# Before 2.13 the compiler loses attributes that a graph writes into the copy of an object: copies are made between two
# graphs there. Since then views are part of a whole graph.
TRACES_VIEWS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

# Methods that transformers hands to functions which look at their signature. The compiler can do so only where it has
# seen them on a module that is older than the graph.
_HANDED_ON = ("feed_forward_chunk", "ff_chunk")

# transformers' mark of a model whose layers are hooked.
_HOOKED = "_output_capturing_hooks_installed"
# Where a view of a model keeps that model.
_VIEW_OF = "_view_of"
# Where a view with a forward of its own keeps the view whose forward that one calls, and itself.
LOOKS_AT = "_view_looks_at"
# Where a view keeps what it was copied from.
SOURCE = "_view_source"


@dataclass(frozen=True, eq=False)
class Source:
    """What a view was copied from, as it was right before.

    Attributes:
        module: the module.
        kind: its class.
        seen: each dictionary that was read (attributes, children, a configuration) with what it held.
    """

    module: nn.Module
    kind: type[nn.Module]
    seen: tuple[tuple[dict[str, Any], tuple[tuple[str, Any], ...]], ...]

    @classmethod
    def of(cls, module: nn.Module, *others: dict[str, Any]) -> Source:
        """The module as it is, and other dictionaries that a view of it is made of."""
        own, children = module.__dict__, module._modules
        seen: list[Any] = [(own, tuple(own.items())), (children, tuple(children.items()))]
        for other in others:
            seen.append((other, tuple(other.items())))
        return cls(module, type(module), tuple(seen))


def outside_graphs(function: F) -> F:
    """A function that copies modules or configurations: where the compiler cannot trace that, it runs by itself."""
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if TRACES_VIEWS or not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return disabled(*args, **kwargs)

    return cast(F, call)


@outside_graphs
def view_of(
    module: M,
    *,
    children: Mapping[str, nn.Module | None] | None = None,
    forward: Callable[..., Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
    read: Mapping[str, Any] | None = None,
) -> M:
    """A second module object over the parameters, buffers and children of `module`.

    Args:
        module: the module to look at; it is not changed.
        children: direct children that the view has instead of the module's own.
        forward: called as forward(original_forward, *args, **kwargs) in place of the module's forward.
        attributes: plain attributes that the view has instead of, or beside, the module's own.
        read: a dictionary that `attributes` were made of, where somebody may change it later.

    Returns:
        A module of type(module), or of a subclass with the same name and forward signature.
    """
    seen = module.__dict__.get(LOOKS_AT)
    if seen is not None and (children or attributes):
        # What the view's forward runs is the module behind it: children and attributes are replaced there.
        module = view_of(view_of(seen[0], children=children, attributes=attributes, read=read), forward=seen[1])
        return module if forward is None else view_of(module, forward=forward)
    kind: Any = type(module)
    is_model = isinstance(module, PreTrainedModel)
    view: Any = _shallow_copy(module, _class_of_view(kind) if is_model else kind, read)
    own = view.__dict__
    if is_model:
        own.setdefault(_VIEW_OF, module)
    own["_modules"] = {**module._modules, **(children or {})}
    own.update(attributes or {})
    if forward is None:
        return view
    outer: Any = _shallow_copy(view, _model_with_forward(kind) if is_model else _class_with_forward(kind))
    outer.__dict__.pop("forward", None)  # a module may have a forward of its own (accelerate's hooks set one)
    if getattr(view, "gradient_checkpointing", False):
        view.gradient_checkpointing = False  # the outer forward recomputes the inner one
    outer.__dict__["_view_forward"] = functools.partial(forward, view.forward)
    outer.__dict__[LOOKS_AT] = (view, forward)
    return outer


def with_modules(module: M, replacements: Mapping[str, nn.Module]) -> M:
    """A view of `module` with other modules at some paths ("encoder.layer.0"); what lies above them are views.

    Args:
        replacements: path -> module; no path lies below another one.
    """
    children: dict[str, nn.Module | None] = {}
    nested: dict[str, dict[str, nn.Module]] = {}
    for path, replacement in replacements.items():
        head, _, tail = path.partition(".")
        if tail:
            nested.setdefault(head, {})[tail] = replacement
        else:
            children[head] = replacement
    for head, below in nested.items():
        children[head] = with_modules(cast(nn.Module, module._modules[head]), below)
    return view_of(module, children=children) if children else module


def in_eval(module: M) -> M:
    """A view of a module, and of every module in it, in eval mode."""
    children = {name: None if child is None else in_eval(child) for name, child in module._modules.items()}
    return view_of(module, children=children, attributes={"training": False})


def _install_hooks_once(model: PreTrainedModel) -> None:
    """Let transformers hook the layers for their outputs here and not when a view is run.

    Layers are shared: every fresh view that is asked for outputs would hook them again.
    So would a model around another one that is hooked already (OPT around its decoder): the innermost has the layers.
    """
    if getattr(model, _HOOKED, False):
        return
    inner = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    for one in inner:
        _install_hooks_once(one)
    if inner:
        setattr(model, _HOOKED, True)
    else:
        maybe_install_capturing_hooks(model)


def _shallow_copy(module: M, cls: type[M], read: Mapping[str, Any] | None = None) -> M:
    """An object of `cls` with the attributes of `module`; what copy.copy does, in steps that torch.compile traces."""
    traced = torch.compiler.is_compiling()
    # What changes from here on is seen to have changed.
    source = None if traced else Source.of(module, *(() if read is None else (read,)))
    copied = object.__new__(cls)
    copied.__dict__.update(module.__dict__)
    if source is not None:
        copied.__dict__[SOURCE] = source
    # What `module.compile()` made runs the module itself.
    copied.__dict__.pop("_compiled_call_impl", None)
    if "forward" in module.__dict__:
        for name in ("forward", "_old_forward"):
            if name in module.__dict__:
                copied.__dict__[name] = _rebound(module.__dict__[name], module, copied)
    if traced:
        for name in _handed_on(cls):
            function = module.__dict__[name].func if name in module.__dict__ else getattr(type(module), name)
            copied.__dict__[name] = functools.partial(function, copied)
    return copied


def can_rebind(function: Callable[..., Any], module: nn.Module) -> bool:
    """Whether a module's own forward can be its copy's."""
    return _rebound(function, module, nn.Module()) is not function


def _rebound(function: Callable[..., Any], module: nn.Module, copied: nn.Module) -> Callable[..., Any]:
    """A module's own forward (accelerate's hooks give it one) for its copy, which may have other children."""
    if isinstance(function, functools.partial) and function.args and function.args[0] is module:
        return functools.partial(function.func, copied, *function.args[1:], **function.keywords)
    if isinstance(function, types.MethodType) and function.__self__ is module:
        return types.MethodType(function.__func__, copied)
    return function


class _HookedElsewhere:
    """A view of a model; transformers asks whether its layers are hooked the first time that outputs are wanted."""

    @property
    def _output_capturing_hooks_installed(self) -> bool:
        _install_hooks_once(self.__dict__[_VIEW_OF])
        return True

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle finds the model's own class by its name, and not the one made of it here."""
        kind = type(self)
        if kind is not _hooked_elsewhere(kind.__mro__[2]):
            return super().__reduce_ex__(protocol)
        return _blank_view, (kind.__mro__[2],), self.__dict__


def _blank_view(kind: Any) -> Any:
    return object.__new__(_hooked_elsewhere(kind))


@torch.compiler.assume_constant_result
def _handed_on(cls: type) -> tuple[str, ...]:
    return tuple(name for name in _HANDED_ON if hasattr(cls, name))


@torch.compiler.assume_constant_result
def _class_of_view(cls: Any) -> Any:
    """The class of a view of a model of class `cls`, which leaves the hooking to that model."""
    return _hooked_elsewhere(cls)


@torch.compiler.assume_constant_result
def _model_with_forward(cls: Any) -> Any:
    """As `_class_with_forward`, of a view of a model: the compiler cannot make that class in a graph."""
    return _class_with_forward(_hooked_elsewhere(cls))


@functools.cache
def _hooked_elsewhere(cls: Any) -> Any:
    if issubclass(cls, _HookedElsewhere):
        return cls
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (_HookedElsewhere, cls), names)


@functools.cache
def _class_with_forward(cls: Any) -> Any:
    """The subclass of `cls` whose forward is the instance's `_view_forward`."""

    # Generation reads the signature of forward, which wraps() carries over.
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._view_forward(*args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
