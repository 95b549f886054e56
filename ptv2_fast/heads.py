"""Trained heads on the backbone's output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.locate import backbone_name
from ptv2_fast.backbone.view import view_of
from ptv2_fast.config import ROW_TASKS, HeadConfig
from ptv2_fast.inputs.pooling import pool
from ptv2_fast.losses import IGNORED_LABEL as IGNORED_LABEL
from ptv2_fast.losses import classification_loss as classification_loss
from ptv2_fast.losses import span_loss as span_loss

M = TypeVar("M", bound=nn.Module)


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

    @property
    def pooling(self) -> str:
        """What a row's vector is made of; an adapter's configuration has settled it by the base."""
        return self.config.pooling or "first"

    def forward(self, hidden: Tensor, attention_mask: Tensor | None, read: Tensor | None = None) -> Tensor:
        """Logits of hidden states (B, N, D); attention_mask (B, N) marks the real tokens, None all.

        Args:
            read: (B,) the tokens of the flattened (B, N) that rows are pooled from, where that is known.
        """
        if self.config.task_type in ROW_TASKS:
            hidden = pool(hidden, attention_mask, self.pooling, read)
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
