"""Sliding windows: how far a layer sees, and padding that they would count."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def smallest_window(backbone: PreTrainedModel) -> int | None:
    """The shortest distance at which a layer of the backbone stops seeing its text; None where none does."""
    config = backbone.config
    window = getattr(config, "sliding_window", None)
    if window is None:
        return None
    kinds = getattr(config, "layer_types", None)
    return window if kinds is None or "sliding_attention" in kinds else None


def common_window(backbone: PreTrainedModel) -> int | None:
    """The distance at which every layer of the backbone stops seeing its text; None where one sees all of it."""
    kinds = getattr(backbone.config, "layer_types", None)
    return smallest_window(backbone) if kinds is None or set(kinds) == {"sliding_attention"} else None


def check_cached_padding(backbone: PreTrainedModel, mask: Tensor) -> None:
    """Refuse cached text with padding between its tokens: a sliding window would count it, and nothing can move.

    Raises:
        ValueError: mask (B, M) has such padding, on a model with windows shorter than the text.
    """
    if counts_padding(backbone, mask):
        raise ValueError(
            "attention_mask must have its padding at the ends of rows only, with a cache on a model with "
            "sliding windows: they would count it as text"
        )


def counts_padding(backbone: PreTrainedModel, mask: Tensor) -> bool:
    """Whether a row of mask (B, M) has padding between its tokens that a window would count as text.

    A window counts slots. With padding at a row's ends alone that is the same as counting the row's own tokens.
    Waits for the device, on models with windows and texts longer than those. Inside torch.compile and under
    CUDA-graph capture nothing is looked at.
    """
    window = smallest_window(backbone)
    if window is None or mask.shape[1] <= window or torch.compiler.is_compiling():
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    real = mask.bool()
    runs = real[:, 0].int() + (real[:, 1:] & ~real[:, :-1]).sum(-1)
    return bool((runs > 1).any())
