"""Work on some tokens of a batch only: their rows gathered into one dense run, and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ptv2_fast.backbone.view import view_of


def gather_tokens(states: Tensor, index: Tensor) -> Tensor:
    """(B, N, D) -> (1, R, D): the tokens at `index` (R,) of the flattened (B, N); B * N stands for no token."""
    flat = states.flatten(0, 1)
    return flat.index_select(0, index.clamp(max=flat.shape[0] - 1))[None]


def scatter_tokens(rows: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """(1, R, D) -> (B, N, D) like `like`: the rows back at `index`, zeros elsewhere; a row for no token is dropped."""
    tokens = like.shape[0] * like.shape[1]
    # One slot more, for the rows that stand for no token: they need no gradient either.
    states = rows.new_zeros(tokens + 1, rows.shape[-1]).index_copy(0, index, rows[0])
    return states[:tokens].unflatten(0, like.shape[:2])


def mlp_of_tokens(layer: nn.Module, index: Tensor) -> nn.Module:
    """A view of a pre-norm layer whose `mlp` computes the tokens `index` (R,) of (B, N) alone."""

    def run(original: Callable[..., Any], states: Tensor) -> Any:
        return scatter_tokens(original(gather_tokens(states, index)), index, states)

    return view_of(layer, children={"mlp": view_of(layer.mlp, forward=run)})
