"""Loops over a model whose own forward is captured, and over one that computes the same packed batches eagerly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch

from graph_steps import batches_for, model_of, optimizer_of
from ptv2_fast.step.capture import WARM_UP_STEPS
from ptv2_fast.step.forward_batch import read_batch
from ptv2_fast.step.options import StepOptions
from ptv2_fast.step.packed import Buckets
from tolerances import assert_same_bits

# What is on by default on CUDA and decides whether a causal model returns logits.
OPTIONS = StepOptions(labelled_rows_loss=True)
UNTIL_CAPTURED = WARM_UP_STEPS + 1


def fresh(case: str):
    """The model of a case of `graph_steps`, in training mode."""
    model = model_of(case)
    model.step_options = OPTIONS
    return model


def captured(model) -> int:
    """How many sizes the model's own forward has captured."""
    found = model.__dict__.get("_captured_forward")
    return 0 if found is None else found.captured


def packed_loss(model, batch, items=None):
    """The loss of a batch as a captured forward computes it, by an eager pass over the same packed batch."""
    named = model.packable(batch, model.packed_task())
    inputs = {name: value for name, value in named.items() if name != "labels"}
    found = read_batch(inputs, named["labels"], model.packed_task(), Buckets(), model.text_limit())
    return model.packed_loss(found.packed()) * (1.0 if items is None else found.counted / items)


def forward_loss(model, batch):
    """The loss of the model's own forward."""
    return model(**batch).loss


def warmed(case: str):
    """A model that has captured the one size of its case's batches, and a batch."""
    model = fresh(case)
    batch = batches_for(case, count=1)[0]
    for _ in range(UNTIL_CAPTURED):
        forward_loss(model, batch).backward()
    model.zero_grad()
    assert captured(model) == 1
    return model, batch


def training(model, loss_of: Callable, batches, accumulate: int = 2, between: Callable | None = None) -> Iterator:
    """The loop that everybody writes, with accumulation, clipping, a schedule and evaluation; gives every step.

    Args:
        loss_of: (model, batch) -> loss.
        between: (step, model) called before each step.
    """
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for step in range(len(batches) // accumulate):
        if between is not None:
            between(step, model)
        optimizer.zero_grad()
        losses = []
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            loss = loss_of(model, batch) / accumulate
            loss.backward()
            losses.append(loss.detach())
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.05)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            evaluated = model.eval()(**batches[0]).loss
        model.train()
        yield SimpleNamespace(
            losses=torch.stack(losses), norm=norm, evaluated=evaluated, gradients=gradients(model), model=model
        )


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients that a model has, copied."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_steps(found, expected) -> None:
    """Fail unless two loops give the same losses, gradients and parameters to the last bit."""
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name in ("losses", "norm", "evaluated"):
            assert_same_bits(getattr(ours, name), getattr(theirs, name), f"{name} of step {step}")
        assert_same_gradients(ours.gradients, theirs.gradients, f"in step {step}")
        for (name, left), (_, right) in zip(
            ours.model.named_parameters(), theirs.model.named_parameters(), strict=True
        ):
            assert_same_bits(left, right, f"{name} after step {step}")


def assert_same_gradients(found, expected, what: str = "") -> None:
    """Fail unless two sets of gradients are the same to the last bit."""
    assert found.keys() == expected.keys() and found, what
    for name, gradient in found.items():
        assert_same_bits(gradient, expected[name], f"gradient of {name} {what}")
