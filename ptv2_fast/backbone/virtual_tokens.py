"""Virtual tokens that evolve in front of a text's words, an image's patches or a sound's frames: rows of one buffer.

In front of patches and frames they have no position: their order, and whether they stand before or behind a class
token, make no difference there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.view import view_of, with_modules


def with_virtual_tokens(prompts: Tensor, states: Tensor) -> Tensor:
    """(B, P + N, D): virtual tokens (P, D) in front of every row's states (B, N, D), in one buffer."""
    return torch.cat([prompts.to(states.dtype).expand(states.shape[0], -1, -1), states], dim=1)


def behind_prompts(embeddings: nn.Module, prompts: Tensor) -> nn.Module:
    """A view of an embedding module that embeds (P, E) virtual tokens in front of every row's text: (B, P + N, E)."""
    length = prompts.shape[0]

    def embed(
        original: Callable[..., Any],
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if mask is not None:
            kwargs["mask"] = mask[:, length:]
        # (B, N, E)
        text = original(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs)
        # Without position ids the embedding module counts from its own first position.
        virtual = original(input_ids=None, inputs_embeds=prompts[None].to(text.dtype))  # (1, P, E)
        return with_virtual_tokens(virtual[0], text)

    return view_of(embeddings, forward=embed)


def of_the_text(output: Any, length: int) -> Any:
    """A model's output with the states of the text alone, behind `length` virtual tokens."""
    output.last_hidden_state = output.last_hidden_state[:, length:]
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(states[:, length:] for states in output.hidden_states)
    return output


@overload
def visible_prompts(attention_mask: Tensor, length: int) -> Tensor: ...
@overload
def visible_prompts(attention_mask: Tensor | None, length: int) -> Tensor | None: ...
def visible_prompts(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """(B, P + N): the mask of a text (B, N) with P virtual tokens in front."""
    return None if attention_mask is None else torch.nn.functional.pad(attention_mask, (length, 0), value=1)


def evolving_view(backbone: PreTrainedModel, prompts: Tensor, first_layer: str, norm: str) -> PreTrainedModel:
    """A view of the backbone in which virtual tokens (P, D) enter with the first layer's input.

    What follows the last layer, from its norm on, sees the model's own N rows only.

    Args:
        first_layer, norm: the paths of the first layer and of the norm behind the last one.
    """
    length = prompts.shape[0]

    def enter(original: Callable[..., Any], states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(with_virtual_tokens(prompts, states), *args, **kwargs)

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
