"""The losses of the tasks, and the checks of what they compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from ptv2_fast.attention import checks
from ptv2_fast.task_types import TASKS

# The label that every loss of this package leaves out.
IGNORED_LABEL = -100


def chosen_loss(base: PreTrainedModel) -> Callable[..., Any] | None:
    """The loss function that somebody set on the base (`model.loss_function = f`); None where nobody did."""
    return base.__dict__.get("_loss_function")


def causal_loss(base: PreTrainedModel) -> Callable[..., Any]:
    """The loss that a causal model's forward calls, without transformers' word about a type that it does not know."""
    known: dict[Any, Any] = LOSS_MAPPING
    loss: Callable[..., Any] = known.get(getattr(base, "loss_type", None), known["ForCausalLM"])
    return chosen_loss(base) or loss


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., C) and labels (...), over labels other than -100; 0 where
    there is none.

    Raises:
        ValueError: labels are no integers, shapes disagree, or a label lies outside [0, C) and is not -100.
    """
    check_labels("labels", labels, logits.shape[-1], logits.shape[:-1])
    flat = labels.reshape(-1).long()
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), flat, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return total / (flat != IGNORED_LABEL).sum().clamp(min=1)


def span_loss(logits: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """Mean of the start's and the end's cross-entropy; logits (B, N, 2), positions (B,), -100
    ignored.

    Raises:
        ValueError: positions are no integers of shape (B,), or one lies outside [0, N) and is not -100.
    """
    sides = {"start_positions": start_positions, "end_positions": end_positions}
    losses: list[Tensor] = []
    for (name, positions), side in zip(sides.items(), logits.unbind(-1)):
        check_labels(name, positions, side.shape[1], side.shape[:1])
        losses.append(classification_loss(side, positions))
    return (losses[0] + losses[1]) / 2


def base_targets(
    base: PreTrainedModel, task_type: str, size: tuple[int, Any], targets: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Targets as the loss of the base's own head takes them, checked.

    Args:
        size: rows B and tokens N of the text, whose number is None where there is no text.
        targets: labels, or start_positions and end_positions.

    Raises:
        ValueError: as `check_labels`.
    """
    rows, tokens = size
    checked = dict(targets)
    classes: Any = base.config.num_labels
    for name, labels in targets.items():
        if name != "labels":
            check_labels(name, labels, tokens, (rows,))
            # The base ignores positions past the text; it takes negative ones for the first token.
            checked[name] = labels.masked_fill(labels == IGNORED_LABEL, tokens)
        elif classes > 1 and not (isinstance(labels, Tensor) and labels.is_floating_point()):
            # Labels that are no integers are those of a base for several labels at once.
            check_labels(name, labels, classes, (rows, tokens) if TASKS[task_type].gives == "token" else (rows,))
    return checked


def check_labels(name: str, labels: Tensor, count: int, shape: Sequence[int]) -> None:
    """Refuse labels that are not integers of a shape, and, where looking is free, those outside [0, count) but -100.

    Looking is free on the CPU: elsewhere it would wait for the device, and in a vmap there is nothing to look at.

    Raises:
        ValueError: see above.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"{name} must be a tensor of integers; got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be integers; got {labels.dtype}")
    if labels.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(labels.shape)}")
    if not checks.readable(labels):
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(labels):
        return
    wrong = ((labels < 0) | (labels >= count)) & (labels != IGNORED_LABEL)
    if bool(wrong.any()):
        found = sorted(set(labels[wrong].flatten().tolist()))[:5]
        raise ValueError(f"{name} must lie in [0, {count - 1}] or be {IGNORED_LABEL}; got {found}")
