"""Forwards that somebody else puts in the place of a causal model's own, as trl's trainers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from ptv2_fast.inputs.arguments import named_arguments

_MAKERS = ("trl",)


class _WithPromptedBackbone:
    """A wrapped model as such a forward knows models: what it calls `base_model` is the backbone, here with prompts."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def base_model(self, *args: Any, adapter_names: Sequence[str] | None = None, **inputs: Any) -> Any:
        """The backbone's output, last_hidden_state (B, N, D) among it, with the prompts."""
        backbone = self._model.backbone
        return self._model.run(backbone, {**named_arguments(backbone.forward, args), **inputs}, adapter_names)

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # while a copy is made
            raise AttributeError(name)
        return getattr(self._model, name)


def with_prompted_backbone(model: Any, forward: Any) -> Any:
    """A forward that is set on `model`; where trl made it, bound so that it runs the backbone with the prompts.

    trl computes its losses in a forward of its own, from `self.base_model(...).last_hidden_state` and the output
    embeddings; a wrapped model's `base_model` is the bare model with its head.
    """
    if isinstance(forward, MethodType) and forward.__self__ is model and _is_theirs(forward.__func__):
        return MethodType(forward.__func__, _WithPromptedBackbone(model))
    return forward


def _is_theirs(function: Callable[..., Any] | None) -> bool:
    """Whether a function, or one that it wraps (accelerate wraps forwards for mixed precision), is of such a maker."""
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__", "").split(".")[0] in _MAKERS:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
