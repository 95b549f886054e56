"""Trained heads on the backbone's output, and the losses of the tasks they serve."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from ptv2_fast.attention import checks
from ptv2_fast.backbone.locate import backbone_name
from ptv2_fast.backbone.view import view_of
from ptv2_fast.config import ROW_TASKS, HeadConfig
from ptv2_fast.inputs.pooling import pool

M = TypeVar("M", bound=nn.Module)

IGNORED_LABEL = -100


class Head(nn.Module):
    """A linear classifier over rows or tokens.

    SEQ_CLS, IMAGE_CLS and AUDIO_CLS give (B, C) from one vector per row, TOKEN_CLS (B, N, C), QUESTION_ANS (B, N, 2).
    """

    def __init__(self, hidden_size: int, config: HeadConfig):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(hidden_size, config.num_labels)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None, read: Tensor | None = None) -> Tensor:
        """Logits of hidden states (B, N, D); attention_mask (B, N) marks the real tokens, None all.

        Args:
            read: (B,) the tokens of the flattened (B, N) that rows are pooled from, where that is known.
        """
        if self.config.task_type in ROW_TASKS:
            hidden = pool(hidden, attention_mask, self.config.pooling, read)
        return self.linear(self.dropout(hidden).to(self.linear.weight.dtype))


def own_heads(base: PreTrainedModel) -> dict[str, nn.Module]:
    """The children of a task model that are its head: everything with parameters beside the backbone."""
    prefix = backbone_name(base)
    if not hasattr(base, prefix):
        return {}
    return {
        name: child for name, child in base.named_children() if name != prefix and any(True for _ in child.parameters())
    }


def copied_heads(base: PreTrainedModel) -> nn.ModuleDict:
    """Trainable copies of a task model's own head, one set per adapter.

    Raises:
        ValueError: the head is quantized, or its weights are offloaded.
    """
    for name, child in own_heads(base).items():
        if any(p.is_meta for p in child.parameters()):
            raise ValueError(f"base must have a head to train; {name!r} is offloaded: wrap the base, then offload it")
        odd = {type(p).__name__ for p in child.parameters() if not p.is_floating_point() or type(p) is not nn.Parameter}
        if odd:
            raise ValueError(
                f"base must have a head to train; {name!r} is quantized ({', '.join(sorted(odd))}). Leave it "
                f"out of the quantization (llm_int8_skip_modules or modules_to_not_convert=[{name!r}]), or give the "
                "backbone heads={...}"
            )
    copies = nn.ModuleDict({name: copy.deepcopy(child) for name, child in own_heads(base).items()})
    return copies.requires_grad_(True)


def resize_heads(heads: nn.Module, before: int, count: int) -> None:
    """Give a copied head another number of classes: its last layer of `before` outputs is replaced by a fresh one.

    Raises:
        ValueError: no layer has as many outputs.
    """
    found = [(m, name) for m in heads.modules() for name, c in m.named_children() if _counts(c, before)]
    if not found:
        raise ValueError(f"base must have a head of {before} classes, whose number can be changed to {count}")
    parent, name = found[-1]
    old: Any = getattr(parent, name)
    fresh = nn.Linear(old.in_features, count, bias=old.bias is not None, dtype=old.weight.dtype)
    setattr(parent, name, fresh)


def _counts(module: nn.Module, count: int) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == count


def with_labels(config: Any, labels: Sequence[str]) -> Any:
    """A copy of a model's configuration with other label names, and as many classes."""
    config = copy.copy(config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    return config


def labels_of(config: Any) -> tuple[str, ...]:
    """The label names that a model's configuration has, in the order of their ids."""
    return tuple(str(config.id2label.get(i, f"LABEL_{i}")) for i in range(config.num_labels))


def at_least_float32(module: M) -> M:
    """`module`, its half-precision parameters and buffers made float32: what trains is never narrower."""
    narrow = (torch.float16, torch.bfloat16)
    return module._apply(lambda tensor: tensor.float() if tensor.dtype in narrow else tensor)


def in_own_dtype(head: M, given: torch.dtype) -> M:
    """`head`; where its parameters are not of the dtype that it is given, a view that casts its inputs to theirs."""
    dtype = next((parameter.dtype for parameter in head.parameters()), given)  # a quantized head has none
    if dtype == given:
        return head

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return view_of(head, forward=forward)


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
    for (name, positions), side in zip(sides.items(), logits.unbind(-1), strict=True):
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
            check_labels(name, labels, classes, (rows, tokens) if task_type == "TOKEN_CLS" else (rows,))
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
