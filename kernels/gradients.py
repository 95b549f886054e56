"""What a backward pass is asked for, and what it gives."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute."""

    query: bool = False
    text: bool = False
    prompt: bool = False
    prompt_bias: bool = False
    bias: bool = False


class Gradients(NamedTuple):
    """Gradients of one backward pass, None where nobody asked; shapes as the inputs'."""

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    prompt_k: torch.Tensor | None = None
    prompt_v: torch.Tensor | None = None
    prompt_bias: torch.Tensor | None = None
    bias: torch.Tensor | None = None
