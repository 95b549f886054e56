"""Which savings of a training step are on, decided in one place."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields

import torch

logger = logging.getLogger("ptv2_fast")


@dataclass(frozen=True)
class StepOptions:
    """Switches of the training step; each None means: on where it is known to pay and to be exact.

    Attributes:
        unpad: run the layers over real tokens only; padding is dropped before the first layer and put back, as
            zeros, after the last. None: while training on CUDA with the triton backend.
        labelled_rows_loss: causal language models compute logits for labelled tokens only, in chunks, and return
            a loss without logits. None: while training on CUDA.
    """

    unpad: bool | None = None
    labelled_rows_loss: bool | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in (None, True, False):
                raise ValueError(f"{field.name} must be True, False or None; got {value!r}")


@dataclass(frozen=True)
class StepPlan:
    """What a step does, and for each switch why."""

    unpad: bool
    labelled_rows_loss: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.reasons)


def plan_step(options: StepOptions, *, training: bool, device: torch.device, backend: str) -> StepPlan:
    """Decide every switch for a step on `device` through `backend` ("auto" is triton on CUDA)."""
    on_cuda = device.type == "cuda"
    fast = on_cuda and backend in ("auto", "triton")
    unpad, why_unpad = _decide(options.unpad, training and fast, "training on CUDA with triton")
    loss, why_loss = _decide(options.labelled_rows_loss, training and on_cuda, "training on CUDA")
    # A loss without logits is for training alone: evaluation reads them.
    loss = loss and training
    return StepPlan(unpad, loss, (f"unpad {why_unpad}", f"labelled_rows_loss {why_loss}"))


def _decide(asked: bool | None, pays: bool, where: str) -> tuple[bool, str]:
    if asked is not None:
        return asked, f"{'on' if asked else 'off'} (asked for)"
    return pays, f"{'on' if pays else 'off'} ({'' if pays else 'not '}{where})"
