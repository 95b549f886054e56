"""A whole training step of a form: forward, loss, backward and the optimizer."""

from __future__ import annotations

import torch

from benchmarks.step.batches import Batch
from benchmarks.step.clock import Step
from benchmarks.step.forms import Bound
from benchmarks.step.verify import clear_gradients

LEARNING_RATE = 1e-4


def make_step(bound: Bound, batch: Batch) -> Step:
    """Forward, loss, backward and the optimizer's step on the prompts."""
    arguments = bound.prepare(batch)
    if bound.take is not None:
        bound.learn(LEARNING_RATE)
        return Step(lambda: bound.take(*arguments), bound.arm)
    optimizer = None
    if bound.trained:
        fused = bound.trained[0].device.type == "cuda"
        optimizer = torch.optim.AdamW(bound.trained, lr=LEARNING_RATE, fused=fused)

    def step() -> None:
        if bound.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        bound.forward(*arguments).backward()
        if optimizer is not None:
            optimizer.step()
        clear_gradients(bound, arguments)

    return Step(step, bound.arm)
