"""Views of a model whose attention runs through the hook: the model's own implementation is neither set nor read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ptv2_fast.attention import hook
from ptv2_fast.attention.prompt_batch import not_reached
from ptv2_fast.backbone.kept_views import KeptViews
from ptv2_fast.backbone.locate import backbone_of, with_backbone
from ptv2_fast.backbone.view import can_rebind, outside_graphs, view_of

# A view that is hooked already has this attribute.
_HOOKED = "_attention_is_hooked"
# What code names that asks a configuration for the attention implementation, itself or through transformers.
_ASKS = ("_attn_implementation", "is_flash_attention_requested", "create_masks_for_generate")

hook.register()


@dataclass(frozen=True)
class _Place:
    """A module that reads an attention implementation, or has such modules below it.

    Attributes:
        kind: its class.
        reads: whether it reads one itself.
        below: its children that are places, by name.
    """

    kind: type[nn.Module]
    reads: bool
    below: Mapping[str, _Place]


class Hooked:
    """Makes views of one backbone, and of models around it, whose attention is the hook's.

    Which implementation a module runs is written in its configuration, which models share with one another. A view has
    copies of both: whatever is set on the model itself, by whomever, changes no view, and no view changes the model.
    Views of the backbone are kept; one that is no longer what would be made of the model is made anew.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        own_attention: bool = False,
        with_layer_index: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
    ):
        """Find the modules that read an attention implementation.

        Args:
            own_attention: attention is the model's own code, and `with_layer_index` makes it run through the hook.
            with_layer_index: makes a view whose attention modules know their layer, where their own do not.

        Raises:
            ValueError: no attention module does.
        """
        self._with_layer_index = with_layer_index
        self._views, self._attention_views = KeptViews(), KeptViews()
        self._places = None if own_attention else _found(backbone)
        if not own_attention and self._places is None:
            raise ValueError(
                f"base must use transformers' attention interface; no attention of {type(backbone).__name__} does"
            )

    def __call__(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """A view of the backbone (or of a view of it) whose attention modules run through the hook and know their
        layer."""
        return self.with_layer_index(self.attention(backbone))

    def with_layer_index(self, view: PreTrainedModel) -> PreTrainedModel:
        """A view of what `attention` gives whose attention modules know their layer."""
        indexed = self._with_layer_index
        return view if indexed is None else self._views.of((view,), lambda: indexed(view))

    def attention(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """A view of the backbone whose attention runs through the hook, as far as it is transformers' own."""
        if self._places is None or _HOOKED in backbone.__dict__:
            return backbone
        return self._attention_views.of((backbone,), lambda: self._attention(backbone))

    def _attention(self, backbone: PreTrainedModel) -> PreTrainedModel:
        view = None if self._places is None else _view(backbone, self._places, {})
        if view is None:  # modules were wrapped or replaced
            self._places = _found(backbone)
            view = None if self._places is None else _view(backbone, self._places, {})
        if view is None:
            raise RuntimeError(not_reached(type(backbone).__name__, "any of its layers"))
        view.__dict__[_HOOKED] = True
        return view

    def whole(self, target: PreTrainedModel) -> PreTrainedModel:
        """A view of a model around the backbone, or of the backbone, for many calls: `generate` asks it for masks."""
        if self._places is None:
            return target
        view = with_backbone(target, self.attention(backbone_of(target)))
        return view_of(view, attributes={"config": _with_hook(view.config)})


def attention_view(backbone: PreTrainedModel) -> PreTrainedModel | None:
    """A view of any backbone whose attention runs through the hook; None where none reads an implementation."""
    places = _found(backbone)
    return None if places is None else _view(backbone, places, {})


def _view(module: Any, place: _Place, configs: dict[int, PretrainedConfig]) -> Any:
    """A view of a module in which every reader reads the hook; None where the module is not as it was found.

    Raises:
        RuntimeError: somebody replaced a forward by a function that would run the module instead of the view.
    """
    _check_forward(module)
    children = {}
    for name, below in place.below.items():
        child = module._modules.get(name)
        view = _view(child, below, configs) if type(child) is below.kind else None
        if view is None:
            return None
        children[name] = view
    if not place.reads:
        return view_of(module, children=children)
    config = module.config
    if id(config) not in configs:
        configs[id(config)] = _with_hook(config)
    return view_of(module, children=children, attributes={"config": configs[id(config)]}, read=config.__dict__)


def _check_forward(module: nn.Module) -> None:
    """Refuse a module whose forward somebody replaced by a function that runs that very module and not its view."""
    own = module.__dict__.get("forward")
    if own is not None and not can_rebind(own, module):
        raise RuntimeError(
            f"base must run its modules by methods of their own; the forward of a {type(module).__name__} was set to a "
            "function, which would run that module without its prompts"
        )


@outside_graphs
def _with_hook(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a configuration that says the hook's name; in steps that torch.compile traces."""
    copied = object.__new__(type(config))
    copied.__dict__.update(config.__dict__)
    copied.__dict__["_attn_implementation_internal"] = hook.IMPLEMENTATION
    return copied


def _found(backbone: PreTrainedModel) -> _Place | None:
    """The places of a backbone; None where no attention is among them."""
    place = _find(backbone)
    return place if place is not None and _has_attention(place) else None


def _has_attention(place: _Place) -> bool:
    own = place.reads and not issubclass(place.kind, PreTrainedModel)
    return own or any(map(_has_attention, place.below.values()))


def _find(module: nn.Module) -> _Place | None:
    below = {name: place for name, child in module._modules.items() if child is not None and (place := _find(child))}
    has_config = isinstance(getattr(module, "config", None), PretrainedConfig)
    kind: Any = type(module)
    reads = has_config and (isinstance(module, PreTrainedModel) or _asks(kind))
    return _Place(kind, reads, below) if reads or below else None


@functools.cache
def _asks(kind: type[nn.Module]) -> bool:
    """Whether the code of a class asks for an attention implementation."""
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    functions = (inspect.unwrap(value) for cls in own for value in vars(cls).values() if inspect.isfunction(value))
    return any(name in _ASKS or _makes_masks(name) for function in functions for name in _names(function.__code__))


def _makes_masks(name: str) -> bool:
    return name.startswith("create_") and name.endswith("_mask")


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
