"""Where captured steps find the prompts of each call: tensors at the same addresses, written anew for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ptv2_fast.attention.prompt_batch import LayerPrompt, PromptBatch

_PARTS = tuple(field.name for field in fields(LayerPrompt))


class PromptPlace:
    """Room for the prompts of a batch, and for others that are of the same sizes.

    Attributes:
        batch: the prompts in their place.
    """

    def __init__(self, prompts: PromptBatch) -> None:
        """Make room for prompts like these; nothing is copied yet.

        Args:
            prompts: none of them lazy.
        """
        with torch.inference_mode(False), torch.no_grad():
            layers = tuple(None if one is None else _like(one) for one in prompts.layers)
            index = None if prompts.index is None else _empty(prompts.index)
        self.batch = replace(prompts, layers=layers, index=index, asked=None)
        self._tensors = list(_tensors(self.batch))

    def fill(self, prompts: PromptBatch) -> None:
        """Copy prompts of the same sizes."""
        if self._tensors:
            with torch.no_grad():
                torch._foreach_copy_(self._tensors, list(_tensors(prompts)))


def sizes_of(prompts: PromptBatch) -> tuple[Any, ...]:
    """What two batches of prompts have in common that fit into one place."""
    layers = [layer and tuple(_size(getattr(layer, part)) for part in _PARTS) for layer in prompts.layers]
    return prompts.backend, _size(prompts.index), *layers


def _like(prompt: Any) -> LayerPrompt:
    found = ((part, getattr(prompt, part)) for part in _PARTS)
    parts: dict[str, Any] = {part: None if tensor is None else _empty(tensor) for part, tensor in found}
    return LayerPrompt(**parts)


def _size(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _empty(tensor: Tensor) -> Tensor:
    """Room for a tensor, contiguous however that lies: who makes prompts lays them out as it likes."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _tensors(prompts: PromptBatch) -> Iterator[Tensor]:
    for layer in prompts.layers:
        if layer is not None:
            yield from (part for name in _PARTS if (part := getattr(layer, name)) is not None)
    if prompts.index is not None:
        yield prompts.index
