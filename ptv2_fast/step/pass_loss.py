"""The loss and the logits of a pass whose gradients were computed along with it, as tensors that autograd knows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Saved by every loss: what is saved raises once the graph has been freed, as in any backward of PyTorch's own.
_SAVED = torch.empty(0)


class Again(Protocol):
    """Runs a pass eagerly, with the gradients and the random numbers that it had: what the stored ones cannot do."""

    def __call__(self, why: str) -> Tensor:
        """The loss (), or the logits, whose graph leads to the parameters.

        Args:
            why: what they are needed for.
        """


class PassGradients:
    """The gradients of one pass's loss, from its forward to its backward."""

    def __init__(self, tensors: list[Tensor]) -> None:
        """Take gradients, which may lie in buffers that the next pass writes to: `keep` comes before that."""
        self._tensors: list[Tensor] | None = tensors
        # A backward of one thread may meet a forward of another.
        self._lock = threading.Lock()

    def times(self, factor: Tensor, is_last: bool) -> Sequence[Tensor]:
        """The gradients times a factor (), in memory of their own.

        Args:
            is_last: nobody asks again.
        """
        with self._lock:
            assert self._tensors is not None, "a graph that was freed raises before"
            scaled = torch._foreach_mul(self._tensors, factor)
            if is_last:
                self._tensors = None
        return scaled

    def keep(self) -> None:
        """Give gradients that somebody may still ask for memory of their own."""
        with self._lock:
            if self._tensors is not None:
                self._tensors = [tensor.clone() for tensor in self._tensors]


def loss_of(value: Tensor, gradients: PassGradients, again: Again, parameters: Sequence[Tensor]) -> Tensor:
    """A loss () whose backward hands the stored gradients of these parameters on."""
    return _Loss.apply(value, gradients, again, *parameters)


def logits_of(value: Tensor, again: Again, parameters: Sequence[Tensor]) -> Tensor:
    """Logits whose backward runs the pass again: few ask for it."""
    return _Logits.apply(value, again, *parameters)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: PassGradients, again: Again, *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.again, ctx.parameters = gradients, again, parameters
        ctx.save_for_backward(_SAVED)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss = ctx.again("a loss is differentiated twice")
            found = torch.autograd.grad(loss, ctx.parameters, factor, create_graph=True)
        else:
            found = ctx.gradients.times(factor, is_last=not _graph_is_kept())
        return None, None, None, *found


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, again: Again, *parameters: Tensor) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(*parameters)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        # Who wraps all outputs, as DDP does to find unused parameters, hands zeros on for those that no loss reads.
        if not twice and not bool(gradient.any()):
            return None, None, *map(torch.zeros_like, parameters)
        logits = ctx.again("a gradient comes through the logits, as of a loss of one's own")
        if not logits.requires_grad:
            # As states of an encoder whose prompts stand in the decoder alone.
            return None, None, *map(torch.zeros_like, parameters)
        found = torch.autograd.grad(logits, parameters, gradient, create_graph=twice, allow_unused=True)
        return None, None, *found


def _graph_is_kept() -> bool:
    """Whether the backward that runs now leaves its graph for another one; True where PyTorch does not say."""
    read = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return read is None or bool(read())
