"""The losses of the tasks, and the checks of what they compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from ptv2_fast.attention import checks
from ptv2_fast.task_types import IGNORED_LABEL as IGNORED_LABEL
from ptv2_fast.task_types import SINGLE_LABEL, TASKS

# What cosines are multiplied by before they are compared, as sentence-transformers has it.
SCALE = 20.0


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
        _at_least_float32(logits).reshape(-1, logits.shape[-1]), flat, ignore_index=IGNORED_LABEL, reduction="sum"
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
    for (name, positions), side in zip(sides.items(), logits.unbind(-1), strict=False):
        check_labels(name, positions, side.shape[1], side.shape[:1])
        losses.append(classification_loss(side, positions))
    return (losses[0] + losses[1]) / 2


def regression_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of logits (B, C) and labels (B, C); with C = 1 labels may be (B,).

    Raises:
        ValueError: labels are no floating-point numbers of such a shape, or one is not finite.
    """
    shapes = [logits.shape, logits.shape[:1]] if logits.shape[-1] == 1 else [logits.shape]
    check_numbers("labels", labels, shapes)
    logits = _at_least_float32(logits)
    return F.mse_loss(logits, labels.to(logits.dtype).view(logits.shape))


def multi_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits (B, C) and labels (B, C), 1 where a row has the label and 0 where it has not.

    Raises:
        ValueError: labels are no floating-point numbers of that shape, or one lies outside [0, 1].
    """
    check_numbers("labels", labels, [logits.shape], low=0.0, high=1.0)
    logits = _at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


# By what the head solves; of a head that gives no spans.
LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    SINGLE_LABEL: classification_loss,
    "regression": regression_loss,
    "multi_label_classification": multi_label_loss,
}


def in_batch_negatives_loss(embeddings: Tensor, scale: float = SCALE) -> Tensor:
    """Mean cross-entropy of each query's own text against the texts of all examples, by their cosines.

    loss = mean_b -log(exp(s c[b, b]) / sum_t exp(s c[b, t])), c[b, t] = query[b] . text[t], s the scale

    Args:
        embeddings: (B, G, D) of length 1: the query, the text that belongs to it, and any that do not.

    Source: multiple negatives ranking (Henderson et al., 2017), InfoNCE (van den Oord et al., 2018).
    """
    exact = _at_least_float32(embeddings)
    # The right texts first: that of query b has index b.
    queries, texts = exact[:, 0], exact[:, 1:].transpose(0, 1).flatten(0, 1)
    return F.cross_entropy(scale * queries @ texts.T, torch.arange(len(queries), device=exact.device))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
    if not _can_look(labels):
        return
    wrong = ((labels < 0) | (labels >= count)) & (labels != IGNORED_LABEL)
    if bool(wrong.any()):
        found = sorted(set(labels[wrong].flatten().tolist()))[:5]
        raise ValueError(f"{name} must lie in [0, {count - 1}] or be {IGNORED_LABEL}; got {found}")


def check_numbers(
    name: str, labels: Tensor, shapes: Sequence[Sequence[int]], low: float = -math.inf, high: float = math.inf
) -> None:
    """Refuse labels that are not floating-point numbers of one of the shapes, or, where looking is free, not finite
    ones in [low, high].

    Raises:
        ValueError: see above.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"{name} must be a tensor of floating-point numbers; got {type(labels).__name__}")
    if not labels.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers; got {labels.dtype}")
    if labels.shape not in [tuple(shape) for shape in shapes]:
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {expected}; got {tuple(labels.shape)}")
    if not _can_look(labels):
        return
    wrong = ~torch.isfinite(labels) | (labels < low) | (labels > high)
    if bool(wrong.any()):
        limits = "be finite" if math.isinf(low) else f"lie in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must {limits}; got {labels[wrong].flatten()[:5].tolist()}")


def _can_look(labels: Tensor) -> bool:
    """Whether numbers can be looked at without waiting for a device, outside vmap."""
    return checks.readable(labels) and not torch._C._functorch.is_functorch_wrapped_tensor(labels)
