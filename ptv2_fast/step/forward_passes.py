"""Forward and backward passes of a model in one state, by their sizes: eager at first, then captured and replayed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ptv2_fast.step.capture import WARM_UP_STEPS, Capture
from ptv2_fast.step.forward_batch import ForwardBatch
from ptv2_fast.step.held import HeldModules
from ptv2_fast.step.observers import Observers
from ptv2_fast.step.packed import StepBatch
from ptv2_fast.step.pass_loss import PassGradients, logits_of, loss_of
from ptv2_fast.step.random_state import RandomState
from ptv2_fast.step.staging import Staging

Share = Tensor | float
# The loss (), and what is given beside it, logits first.
Outcome = tuple[Tensor, tuple[Tensor, ...]]


class LossModel(Protocol):
    """A model that computes the loss of batches as steps have them."""

    def packed_outputs(self, packed: Any) -> Outcome:
        """The loss (), and what a forward gives beside it."""


@dataclass
class _Size:
    """Passes of one size: how many there were, and what replays them from which buffers."""

    passes: int = 0
    # Which of the trained parameters have gradients.
    used: list[int] = field(default_factory=list)
    staging: Staging | None = None
    beside: tuple[Tensor, ...] = ()
    replay: Callable[[], Tensor | None] | None = None


class ForwardPasses:
    """The passes of one model while its state is one: adapter, switches, autocast, and where its weights lie."""

    def __init__(
        self, parts: Sequence[nn.Module], adapter: nn.Module, autocast: torch.dtype | None, device: torch.device
    ) -> None:
        """Note who trains; nothing is captured yet.

        Args:
            parts: what a pass runs, without the wrapper that has these passes: nothing here keeps that alive.
            adapter: the module whose parameters train, as far as they require gradients.
            autocast: the dtype of the autocast that passes run under; None for none.
            device: where passes run.
        """
        self._places = _trained_places(adapter)
        self._trained = list({id(parameter): parameter for _, _, parameter in self._places}.values())
        self.observers = Observers((module for part in parts for module in part.modules()), self._trained)
        self._parts = nn.ModuleList(parts)
        self._autocast = autocast
        self._device = device
        self._share = torch.ones((), dtype=torch.float32, device=device)
        self._sizes: dict[Hashable, _Size] = {}
        # Known after the first pass, which moves weights that are run together.
        self._held: HeldModules | None = None
        # Where replays leave gradients; made at the first capture.
        self._gradients: list[Tensor] = []
        # Where they leave what is given beside the loss: copied out before the next one, whatever its size.
        self._rooms: dict[tuple[int, torch.dtype], Tensor] = {}
        self._latest: weakref.ref[PassGradients] | None = None

    @property
    def trains(self) -> bool:
        """Whether anything does."""
        return bool(self._trained)

    @property
    def captured(self) -> int:
        """How many sizes have been captured."""
        return sum(size.replay is not None for size in self._sizes.values())

    def changed(self) -> str | None:
        """Why what was captured would be wrong now; None where it would not."""
        if self._held is None:
            return None
        if any(place.get(name) is not parameter for place, name, parameter in self._places):
            return "a trained parameter was replaced"
        return self._held.changed() or self._held.others_changed()

    def is_due(self, sizes: Hashable) -> bool:
        """Whether the next pass of these sizes is to be captured first."""
        size = self._sizes.get(sizes)
        return size is not None and size.replay is None and size.passes >= WARM_UP_STEPS

    def capture(self, model: LossModel, batch: ForwardBatch, capture: Capture) -> None:
        """Capture the passes of a batch's sizes, which have run before.

        Raises:
            Exception: whatever refuses the capture; nothing has run then.
        """
        size = self._sizes[batch.sizes]
        if not self._gradients:
            self._gradients = [torch.empty_like(parameter) for parameter in self._trained]
        staging = Staging(batch.packed(), self._device)
        places = [self._gradients[i] for i in size.used]

        def run() -> Tensor:
            loss, beside, found = self._compute(model, staging.batch)
            torch._foreach_copy_(places, [gradient for gradient in found if gradient is not None])
            for place, value in zip(size.beside, beside, strict=True):
                place.copy_(value)
            return loss

        size.replay, size.staging = capture(run), staging

    def run(
        self, model: LossModel, batch: ForwardBatch, share: Share, capture: Capture, again_said: Callable[[str], None]
    ) -> Outcome | None:
        """Loss () and logits of one pass, replayed where its size is captured; all lead to the parameters' gradients.

        Args:
            share: what the loss is multiplied by.
            again_said: told why, where autograd asks for what is not stored.

        Returns:
            the outcome; None where nothing trains.
        """
        again = _Again(model, batch, share, self._autocast, RandomState(self._device), again_said)
        self._set_share(share)
        size = self._sizes.setdefault(batch.sizes, _Size())
        if size.replay is None:
            on_device = batch.packed().to(self._device)
            loss, beside, found = capture.warm_up(lambda: self._compute(model, on_device))
            size.used = [i for i, gradient in enumerate(found) if gradient is not None]
            size.beside = tuple(self._room(i, value) for i, value in enumerate(beside))
            gradients = PassGradients([gradient for gradient in found if gradient is not None])
        else:
            loss, beside = self._replay(size, batch), size.beside
            gradients = PassGradients([self._gradients[i] for i in size.used])
            self._latest = weakref.ref(gradients)
        size.passes += 1
        if self._held is None:
            self._held = HeldModules(self._parts)
        if not size.used:
            return None
        own = [self._trained[i] for i in size.used]
        placed = batch.layout(beside) if beside else ()
        outputs = tuple(logits_of(value, partial(again.beside, i), own) for i, value in enumerate(placed))
        return loss_of(loss, gradients, again, own), outputs

    def _room(self, place: int, like: Tensor) -> Tensor:
        """A tensor like another one, in memory that those of other sizes use too."""
        room = self._rooms.get((place, like.dtype))
        if room is None or room.numel() < like.numel():
            # Powers of two: however many sizes come, each larger than the last, the memory of all is bounded.
            room = torch.empty(1 << (max(like.numel(), 1) - 1).bit_length(), dtype=like.dtype, device=like.device)
            self._rooms[place, like.dtype] = room
        return room[: like.numel()].view(like.shape)

    def _replay(self, size: _Size, batch: ForwardBatch) -> Tensor:
        """The loss of a captured pass; its gradients are in the buffers of all."""
        assert size.replay is not None and size.staging is not None
        if self._latest is not None and (latest := self._latest()) is not None:
            latest.keep()
        size.staging.fill(partial(batch.host.write, batch.sizes))
        loss = size.replay()
        assert loss is not None
        return loss

    def _set_share(self, share: Share) -> None:
        if isinstance(share, Tensor):
            self._share.copy_(share, non_blocking=True)
        else:
            self._share.fill_(share)

    def _compute(
        self, model: LossModel, batch: StepBatch
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Loss, logits and gradients of one pass; the gradients as a backward outside of autocast finds them."""
        loss, beside = _eager(model, batch, self._share, self._autocast)
        with torch.autocast(self._device.type, enabled=False):
            nothing: tuple[Tensor | None, ...] = (None,) * len(self._trained)
            found = torch.autograd.grad(loss, self._trained, allow_unused=True) if loss.requires_grad else nothing
        return loss.detach(), tuple(value.detach() for value in beside), found


def _trained_places(adapter: nn.Module) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
    """Where trained parameters are found, and which ones."""
    return [
        (module._parameters, name, parameter)
        for module in adapter.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]


def _eager(model: LossModel, batch: StepBatch, share: Share, autocast: torch.dtype | None) -> Outcome:
    """A pass's loss, times its share, and logits, with their graphs."""
    with _under(batch.input_ids.device, autocast):
        loss, beside = model.packed_outputs(batch)
        # A share is float32; the loss of a base in bfloat16 stays what it is.
        return (loss * share).to(loss.dtype), beside


def _under(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager:
    """Autocast, or none whatever is on. Under capture nothing that it caches may outlive the graph."""
    if autocast is None:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, autocast, cache_enabled=False)


@dataclass(frozen=True)
class _Again:
    """Runs a pass eagerly, with the random numbers that it had."""

    model: LossModel
    batch: ForwardBatch
    share: Share
    autocast: torch.dtype | None
    random: RandomState
    said: Callable[[str], None]

    def __call__(self, why: str) -> Tensor:
        """The loss (), whose graph leads to the parameters."""
        return self._run(why)[0]

    def beside(self, place: int, why: str) -> Tensor:
        """One of what is given beside the loss, whose graph leads to the parameters."""
        with torch.enable_grad():
            return self.batch.layout(self._run(why)[1])[place]

    def _run(self, why: str) -> Outcome:
        self.said(why)
        with torch.enable_grad(), self.random.again():
            packed = self.batch.packed().to(self.random.device)
            return _eager(self.model, packed, self.share, self.autocast)
