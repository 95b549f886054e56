"""Virtual tokens that evolve in front of an image's patches or a sound's frames: rows of one buffer.

They have no position, so their order and their place before or behind a class token make no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.models.view import view_of, with_modules


def joined(prompts: Tensor, states: Tensor) -> Tensor:
    """(B, P + N, D): virtual tokens (P, D) in front of the rows of states (B, N, D)."""
    return torch.cat([prompts.to(states.dtype).expand(states.shape[0], -1, -1), states], dim=1)


def evolving_view(backbone: PreTrainedModel, prompts: Tensor, first_layer: str, norm: str) -> PreTrainedModel:
    """A view of the backbone in which virtual tokens (P, D) enter with the first layer's input.

    What follows the last layer, from its norm on, sees the model's own N rows only.

    Args:
        first_layer, norm: the paths of the first layer and of the norm behind the last one.
    """
    length = prompts.shape[0]

    def enter(original: Callable[..., Any], states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(joined(prompts, states), *args, **kwargs)

    def leave(original: Callable[..., Any], states: Tensor) -> Any:
        return original(states[:, length:])

    changed = {first_layer: enter, norm: leave}
    views = {path: view_of(backbone.get_submodule(path), forward=run) for path, run in changed.items()}
    return with_own_states(with_modules(backbone, views))


def with_own_states(backbone: PreTrainedModel) -> PreTrainedModel:
    """A view of a backbone whose hidden states are those of the rows of its `last_hidden_state`, the last ones."""

    def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        own = output.last_hidden_state.shape[1]
        if output.hidden_states is not None:
            # Where a call selects some layers, the others are None.
            output.hidden_states = tuple(None if s is None else s[:, -own:] for s in output.hidden_states)
        return output

    return view_of(backbone, forward=run)
