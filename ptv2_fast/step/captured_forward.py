"""Decides whether a training forward is captured and replayed, and says once why it is not."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.sharded_weights import device_of
from ptv2_fast.families.registry import is_listed
from ptv2_fast.losses import chosen_loss
from ptv2_fast.step.capturable import why_not_layers, why_not_modules
from ptv2_fast.step.capture import CAPTURES, Capture
from ptv2_fast.step.forward_batch import ForwardBatch, read_batch, why_not_read
from ptv2_fast.step.forward_passes import ForwardPasses, LossModel, Outcome
from ptv2_fast.step.look import Attributes, Look
from ptv2_fast.step.observers import autocast_of, why_not_now
from ptv2_fast.step.options import StepOptions, StepPlan, logger
from ptv2_fast.step.packed import Buckets, PackedTask

# Sizes beyond so many run eagerly, those of all states together.
MAX_GRAPHS = 64
# Gradients that are computed before the loss is scaled might vanish.
_HALF = "float16 needs a scaled loss"


class PassModel(LossModel, Protocol):
    """A wrapped model, as far as its captured passes know it."""

    training: bool
    step_options: StepOptions
    base_model: PreTrainedModel
    adapters: Any
    active_adapter: str

    @property
    def backbone(self) -> PreTrainedModel:
        """The base without its task's head."""

    def step_plan(self) -> StepPlan:
        """What the step leaves out."""

    def text_limit(self) -> int | None:
        """The most tokens of a text."""

    def renew_copies(self) -> None:
        """Make what steps have copied of the base's weights anew where these have been written to."""

    def packed_task(self) -> PackedTask:
        """By what a batch is packed."""

    def why_not_packed(self) -> str | None:
        """Why the loss cannot be computed of a `PackedBatch`."""


class CapturedForward:
    """The captured passes of one model, which its own forward replays.

    A forward in training that has labels packs its batch and computes the loss and its gradients at once: the first
    two of a size eagerly, the others by one launch. The loss hands the gradients on in backward, so that whatever
    surrounds the model (accumulation, clipping, DDP, any optimizer) finds what it always found. A copy has none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets = Buckets()
        self._owner: weakref.ref[Any] | None = None
        self._capture: Capture | None = None
        self._passes: dict[tuple, ForwardPasses] = {}
        # What is known as long as nobody changes the attributes beside it, or what the passes rely on.
        self._looked: tuple[Look, Attributes, ForwardPasses] | None = None
        self._stream: Any = None
        self._refused: str | None = None
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[type[CapturedForward], tuple[()]]:
        return CapturedForward, ()

    @property
    def captured(self) -> int:
        """How many sizes have been captured, in all states that are known."""
        return sum(passes.captured for passes in self._passes.values())

    def forget(self) -> None:
        """Give all that was captured back, with its memory: the model moves, or is gone."""
        self._passes, self._looked, self._capture, self._stream = {}, None, None, None

    def __call__(
        self, model: PassModel, inputs: Mapping[str, Any], labels: Any, items: Tensor | int | None = None
    ) -> Outcome | None:
        """The loss () of a forward, and what it gives beside it; None where it has to run as any other does.

        Args:
            inputs: keyword arguments of the forward, without labels.
            items: what the sum of the losses is divided by, in the place of this batch's own number of labels.
        """
        device = device_of(model.backbone)
        if device.type not in CAPTURES or model.step_options.cuda_graphs is False:
            return None
        # Another thread runs this model: what is one at a time here must not wait for it.
        if not self._lock.acquire(blocking=False):
            return None
        try:
            if not self._is_of(model):
                return None
            look, passes = self._look(model)
            # Where it is off the log of the plan says why.
            if not look.plan.cuda_graphs:
                return None
            outcome: Outcome | str | None = self._why_not(look, device, inputs, labels, items)
            if outcome is None:
                if look.plan.float8:
                    model.renew_copies()
                outcome = self._run(model, look, passes, device, inputs, labels, items)
            if isinstance(outcome, str):
                self._log_once(f"training step: not captured: {outcome}")
                return None
            return outcome
        finally:
            self._lock.release()

    def _look(self, model: PassModel) -> tuple[Look, ForwardPasses | None]:
        """What the model says of this step, and the passes that are known to be as they were, if there are any."""
        if self._looked is not None:
            look, attributes, passes = self._looked
            if attributes.same() and passes.changed() is None:
                return look, passes
            self._looked = None
        plan = model.step_plan()
        return Look.at(model, plan, _why_not_model(model, plan)), None

    def _run(
        self,
        model: PassModel,
        look: Look,
        known: ForwardPasses | None,
        device: torch.device,
        inputs: Mapping[str, Any],
        labels: Tensor,
        items: Tensor | int | None,
    ) -> Outcome | str | None:
        """The pass of a call that can be captured; or why it cannot, which is seen only here.

        Args:
            known: passes that are as they were.
        """
        passes = self._passes_of(model, look, known, device)
        if isinstance(passes, str):
            return passes
        assert look.task is not None, "what cannot be packed has been refused"
        batch = read_batch(inputs, labels, look.task, self._buckets, look.limit, look.padding, unpads=look.plan.unpad)
        if isinstance(batch, str):
            return batch
        self._follow(device)
        capture = self._capturing(device)
        if passes.is_due(batch.sizes) and (why := self._capture_or_why(passes, model, batch, capture)):
            return why
        outcome = passes.run(model, batch, _share(batch, items), capture, self._refuse)
        if self._looked is None:
            self._looked = look, Attributes(model), passes
        return outcome

    def _why_not(
        self, look: Look, device: torch.device, inputs: Mapping[str, Any], labels: Any, items: Tensor | int | None
    ) -> str | None:
        """Why a call is not one that can be captured, as far as that is cheap to see."""
        if look.task is None or self._refused is not None:
            return self._refused or look.not_packed
        if reason := why_not_read(inputs, labels, look.task):
            return reason
        if autocast_of(device) is torch.float16:
            return _HALF
        if isinstance(items, Tensor) and items.dim():
            return f"num_items_in_batch has the shape {tuple(items.shape)}"
        return look.not_captured or why_not_now(device)

    def _passes_of(
        self, model: PassModel, look: Look, known: ForwardPasses | None, device: torch.device
    ) -> ForwardPasses | str:
        """The passes of the state that a model is in; or why there are none."""
        autocast = autocast_of(device)
        deterministic = torch.are_deterministic_algorithms_enabled()
        parts = (model.base_model, model.adapters)
        # The parts live as long as the passes that are found by their ids.
        key = (look.relies_on, autocast, deterministic, *map(id, parts))
        passes = self._passes.get(key)
        if passes is not None and passes is not known and (why := passes.changed()):
            if passes.captured:
                logger.info("training step: captured steps are dropped: %s", why)
            del self._passes[key]
            passes = None
            # The memory that graphs share is given back with the last one: the next one begins with its own.
            if not self.captured:
                self._capture = None
        if passes is None:
            if any(parameter.requires_grad for parameter in model.base_model.parameters()):
                return "parameters of the base train"
            if reason := why_not_modules(model.base_model, model.adapters[model.active_adapter]):
                return reason
            passes = ForwardPasses(parts, model.adapters[model.active_adapter], autocast, device)
        if not passes.trains:
            return "no parameter of the active adapter trains"
        if reason := passes.observers.found():
            return reason
        self._passes[key] = passes
        return passes

    def _capture_or_why(
        self, passes: ForwardPasses, model: PassModel, batch: ForwardBatch, capture: Capture
    ) -> str | None:
        """Capture the passes of a batch's sizes; or why that is refused."""
        if self.captured >= MAX_GRAPHS:
            return f"more than {MAX_GRAPHS} sizes of batches: further ones run eagerly"
        try:
            passes.capture(model, batch, capture)
        except Exception as error:
            line = (str(error).strip().splitlines() or ["no reason given"])[0]
            self._refuse(f"a pass could not be captured: {type(error).__name__}: {line}")
            return self._refused
        line = "training step: forward and backward are captured, one CUDA graph for each size of batch"
        self._log_once(f"{line} (StepOptions(cuda_graphs=False) switches that off)")
        return None

    def _is_of(self, model: PassModel) -> bool:
        """Whether this belongs to a model, and not to one of which that is a view with modules of its own."""
        owner = None if self._owner is None else self._owner()
        if owner is None:
            self.forget()
            self._owner = weakref.ref(model, self._lose)
        return owner is None or owner is model

    def _lose(self, owner: object) -> None:
        """The model is gone: what is noted of it would hold its weights until somebody looks for cycles."""
        self._owner = None
        self.forget()

    def _capturing(self, device: torch.device) -> Capture:
        if self._capture is None:
            self._capture = CAPTURES[device.type](device)
        return self._capture

    def _follow(self, device: torch.device) -> None:
        """All passes write to the same buffers: those on another stream than the last ones come after them."""
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _refuse(self, why: str) -> None:
        """Capture nothing from now on, and replay nothing."""
        self._refused = self._refused or why
        self.forget()

    def _log_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            logger.info("%s", line)


def _why_not_model(model: PassModel, plan: StepPlan) -> str | None:
    """Why the model's passes cannot be replayed, or are not what its forward computes."""
    base, backbone = model.base_model, model.backbone
    config = backbone.config
    if not type(base).__module__.startswith("transformers.") or not is_listed(backbone):
        return f"{type(base).__name__} is not a listed model of transformers: it may do more than its layers"
    if backbone.dtype is torch.float16:
        return _HALF
    if chosen_loss(base) is not None:
        return "the loss is another one than the task's"
    if model.packed_task().task_type == "CAUSAL_LM" and not plan.labelled_rows_loss:
        return "step_options.labelled_rows_loss is off: a captured loss comes without logits"
    if config.output_hidden_states or config.output_attentions:
        return "the base's configuration asks for hidden states or attention weights"
    return why_not_layers(backbone)


def _share(batch: ForwardBatch, items: Tensor | int | None) -> Tensor | float:
    """What the mean over a batch's own labels is multiplied by to be their sum over so many items."""
    if items is None:
        return 1.0
    counted = max(batch.counted, 1)
    return counted / items if isinstance(items, Tensor) or items else math.inf
