"""Gradient checkpointing of a frozen base: activations computed again in backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from ptv2_fast.frozen_base import FrozenBase


def check_checkpointing(base: FrozenBase) -> None:
    """Refuse the kind that would lose the gradients of prompts; asked while training, where it is used.

    Raises:
        ValueError: the base checkpoints by the reentrant kind.
    """
    holders = (base.backbone, *base.family.layers(base.backbone))
    functions = [m._gradient_checkpointing_func for m in holders if getattr(m, "gradient_checkpointing", False)]
    if any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions):
        raise ValueError(
            "gradient checkpointing must be non-reentrant: prompts reach the layers beside the inputs that the "
            "reentrant kind tracks; pass use_reentrant=False"
        )


def enable_checkpointing(model: PreTrainedModel, asked: Mapping[str, Any] | None, **others: Any) -> None:
    """Let a base recompute its activations in backward, by the kind that keeps the gradients of prompts.

    Args:
        asked: arguments of `torch.utils.checkpoint.checkpoint`.
        others: further arguments of the base's own method.

    Raises:
        ValueError: the reentrant kind is asked for.
    """
    chosen = {"use_reentrant": False, **(asked or {})}
    if chosen["use_reentrant"]:
        raise ValueError("use_reentrant must be False: the reentrant kind loses the prompts' gradients")
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(chosen, **others)
    else:
        model.gradient_checkpointing_enable(chosen, **others)
