"""Which arguments of a forward somebody reads, and what the positional ones are called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

from ptv2_fast.inputs.cache import CACHE_NAMES
from ptv2_fast.losses import causal_loss

# What transformers' models, losses, Trainer and pipelines read without naming it in a signature, and what we read, or
# refuse with a reason.
_COMMON = frozenset(TransformersKwargs.__annotations__) | {
    *CACHE_NAMES, "cache_position", "end_positions", "head_mask", "input_ids", "labels", "logits_to_keep",
    "max_length_k", "max_length_q", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "shift_labels", "start_positions", "task", "token_type_ids",
    "use_cache",
}  # fmt: skip


def named_arguments(forward: Callable[..., Any], args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments of a bound forward by name; those that are None are left out."""
    if not args:
        return {}
    names = inspect.signature(forward).bind_partial(*args).arguments
    return {name: value for name, value in names.items() if value is not None}


def check_read(given: Mapping[str, Any], own: Callable[..., Any], base: PreTrainedModel) -> None:
    """Refuse keyword arguments that no forward inside the base, nor its loss, has a name for: they would be dropped.

    Args:
        given: what a call has beside the named arguments of our own forward; what is None is not looked at.
        own: our own forward.

    Raises:
        ValueError: an argument is read by nobody; the message has the nearest name that is.
    """
    unknown = {name for name, value in given.items() if value is not None} - _COMMON
    if not unknown or torch.compiler.is_compiling():
        return
    if _is_foreign(base):
        return
    readers = [own, causal_loss(base), *{type(module).forward for module in base.modules()}]
    known = _COMMON.union(*map(_named, readers))
    for name in sorted(unknown - known):
        near = get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name} must not be given: nothing in {type(base).__name__} reads it{hint}")


def _is_foreign(base: PreTrainedModel) -> bool:
    """Whether a model or a loss that transformers does not bring may look into its keyword arguments by itself."""
    models = {type(module).__module__ for module in base.modules() if isinstance(module, PreTrainedModel)}
    if not all(name.startswith("transformers.") for name in models):
        return True
    loss = base.__dict__.get("_loss_function")
    return loss is not None and any(p.kind is p.VAR_KEYWORD for p in inspect.signature(loss).parameters.values())


@functools.lru_cache(maxsize=1024)
def _named(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's parameters, apart from * and ** ones."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)) - {"self"}
