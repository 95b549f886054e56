"""Examples of several rows that are compared (choices, say): from inputs (B, C, N) to B C rows, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from ptv2_fast.backbone.view import view_of

M = TypeVar("M", bound=nn.Module)

# What a call has for each token, and how many axes that has.
_BY_TOKEN = {"input_ids": 3, "attention_mask": 3, "token_type_ids": 3, "position_ids": 3, "inputs_embeds": 4}
_MAIN = ("input_ids", "inputs_embeds")


def flat_rows(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, int]]:
    """The inputs (B, C, N) of a forward as rows (B C, N), those of an example next to each other, and (B, C).

    Raises:
        ValueError: one has another shape.
    """
    flat, sizes = dict(inputs), None
    for name in sorted(_BY_TOKEN, key=lambda name: name not in _MAIN):
        value = inputs.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dim() != _BY_TOKEN[name]:
            shape = "(B, C, N)" if _BY_TOKEN[name] == 3 else "(B, C, N, D)"
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a tensor of shape {shape}, the C rows of each example; got {found}")
        sizes = tuple(value.shape[:2]) if sizes is None else sizes
        if value.shape[:2] != sizes:
            raise ValueError(f"{name} must be of {sizes[0]} examples of {sizes[1]} rows; got {tuple(value.shape)}")
        flat[name] = value.flatten(0, 1)
    if all(inputs.get(name) is None for name in _MAIN) or sizes is None:
        raise ValueError(f"exactly one of {' and '.join(_MAIN)} must be given")
    return flat, (sizes[0], sizes[1])


def names_of_rows(adapter_names: Sequence[str] | None, sizes: tuple[int, int]) -> Sequence[str] | None:
    """The adapter of each row, from that of each example.

    Raises:
        ValueError: there is not one name for each example.
    """
    if adapter_names is None:
        return None
    examples, rows = sizes
    if isinstance(adapter_names, str) or len(adapter_names) != examples:
        raise ValueError(f"adapter_names must be one name for each of {examples} examples; got {adapter_names!r}")
    return [name for name in adapter_names for _ in range(rows)]


def with_groups(base: M, sizes: tuple[int, int]) -> M:
    """A view of a base with a multiple-choice head that is called with rows (B C, N).

    It reads the number of choices off its main input alone; the others it would flatten, and they are flat.
    """

    def forward(original: Callable[..., Any], *args: Any, **inputs: Any) -> Any:
        grouped = {name: inputs[name].unflatten(0, sizes) for name in _MAIN if inputs.get(name) is not None}
        return original(*args, **{**inputs, **grouped})

    return view_of(base, forward=forward)
