"""A word to whoever trains prompts at a rate that suits whole models: they would stay what they are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ptv2_fast.prompts.encoder import PromptEncoder

logger = logging.getLogger(__name__)

# The best rates of MiniLM's prompts were 1e-2 and 2e-2 (benchmarks/results/quality_minilm_cpu.json); those of the
# released runs of P-Tuning v2 without an MLP lie from 5e-3 to 6e-2 (`ptv2_fast.training.recipes`).
LEAST, USUAL = 1e-3, 1e-2
# An optimizer that steps so often without a model's prompts is another one's, or the prompts are frozen.
_TRIES = 8

# The adapters of each model whose training has begun, or whose rate is judged.
_known: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
# Models that train and are not judged yet: how many steps were looked at, and the rate of the one before.
_waiting: WeakKeyDictionary[nn.Module, tuple[int, float | None]] = WeakKeyDictionary()
_hook: list[Any] = []


def watch_rate(model: nn.Module, *, begins: bool = True) -> None:
    """Look at the first steps of whichever Adam trains a model's prompts, and warn once where their rate is too low.

    Each adapter is looked at for itself. Prompts that an MLP makes are left alone, which train at low rates, and so are
    groups that have other parameters than the model's adapters: what suits those is not known here.

    Args:
        begins: whether training begins now; if not, it may, and steps that are another model's do not count for good.
    """
    known = _known.setdefault(model, set())
    name = str(model.active_adapter)
    if name not in known and (begins or model not in _waiting):
        _waiting[model] = (0, None)
    if begins:
        known.add(name)
    if _waiting and not _hook:
        _hook.append(register_optimizer_step_pre_hook(_look))
    elif _hook and not _waiting:
        _hook.pop().remove()


def _look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for model, (steps, before) in list(_waiting.items()):
        group = _group_of(model, optimizer.param_groups) if "adam" in type(optimizer).__name__.lower() else None
        rate = _rate_of(group)
        if rate is None:
            _next(model, steps + 1, None)
        elif before is None:
            _next(model, steps + 1, rate)
        else:
            del _waiting[model]
            _known.setdefault(model, set()).add(str(model.active_adapter))
            _judge(group or {}, before, rate)


def _rate_of(group: Mapping[str, Any] | None) -> float | None:
    """A group's rate; None where there is none, or where it is on a device, which would have to be waited for."""
    rate = None if group is None else group["lr"]
    if isinstance(rate, torch.Tensor) and rate.device.type == "cpu":
        return float(rate)
    return rate if isinstance(rate, float | int) else None


def _next(model: nn.Module, steps: int, rate: float | None) -> None:
    if steps < _TRIES:
        _waiting[model] = (steps, rate)
    else:
        del _waiting[model]


def _judge(group: Mapping[str, Any], before: float, now: float) -> None:
    """Warn, unless the rate is on its way up, by a schedule or by hand."""
    scheduled = group.get("initial_lr")
    peak = max(scheduled if scheduled is not None else before, group.get("max_lr", 0.0))
    settled = now <= (before if scheduled is None else peak)
    if settled and peak < LEAST:
        logger.warning(
            "prompts train at a learning rate of %g, which suits whole models: they will hardly change. Take %g or so, "
            "TrainingArguments(learning_rate=%g); the defaults of ptv2_fast.training.TrainingArguments are for prompts",
            peak, USUAL, USUAL,
        )  # fmt: skip


def _group_of(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The group that has prompts of the model, and nothing but what its adapters train."""
    prompts = {id(prompt) for prompt in _prompts(model)}
    own = {id(parameter) for adapter in _adapters(model) for parameter in adapter.parameters()}
    for group in groups:
        there = {id(parameter) for parameter in group["params"]}
        if there & prompts and there <= own:
            return group
    return None


def _prompts(model: nn.Module) -> Iterator[nn.Parameter]:
    for adapter in _adapters(model):
        for encoder in adapter.modules():
            if isinstance(encoder, PromptEncoder) and encoder.mlp is None and encoder.prompts.requires_grad:
                yield encoder.prompts


def _adapters(model: nn.Module) -> Iterable[nn.Module]:
    adapters: Any = model.adapters
    return list(adapters.values())
