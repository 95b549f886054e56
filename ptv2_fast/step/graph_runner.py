"""Whole training steps captured in CUDA graphs, one for each size of batch that comes back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ptv2_fast.backbone.sharded_weights import device_of, is_sharded
from ptv2_fast.step.capturable import why_not_layers, why_not_modules
from ptv2_fast.step.capture import CAPTURES, WARM_UP_STEPS, Capture
from ptv2_fast.step.held import HeldGradients, HeldModel, HeldOptimizer, check_gradients, trained_by
from ptv2_fast.step.host_batch import SPAN
from ptv2_fast.step.look import Attributes, Look
from ptv2_fast.step.observers import Observers, autocast_of, why_not_now
from ptv2_fast.step.options import StepPlan, logger
from ptv2_fast.step.packed import Buckets, OnHost, StepBatch
from ptv2_fast.step.padded_batches import moved, packed_batches
from ptv2_fast.step.staging import Staging
from ptv2_fast.task_types import TASKS

T = TypeVar("T")


@dataclass
class _Bucket:
    """One size of batches: how often it came, where its batches are copied to, and what replays its pass."""

    passes: int = 0
    staging: Staging | None = None
    replay: Callable[[], Tensor | None] | None = None


class GraphRunner:
    """Runs training steps with one launch for a forward and backward pass, and one for the optimizer.

    Batches are packed on the host, filled up to sizes that repeat, and copied into the buffers of their size. The first
    two passes of a size run eagerly; the third is captured and replayed from then on. Nothing in a step waits for the
    host. What cannot be captured or packed runs eagerly and gives the same losses; why is logged once. In a distributed
    job gradients are averaged over the processes.

    A step zeroes gradients first and leaves its own behind, averaged and clipped. Learning rates may change at every
    step. What was captured is dropped, and the log says why, when another adapter, other switches, moved weights, other
    modules or trained parameters, or the optimizer's state and settings would make it wrong.

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertModel

        from ptv2_fast import GraphRunner, PTuningV2Config, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", heads={"topic": 3})).train()
        runner = GraphRunner(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        for _ in range(3):  # batches are padded, on the CPU
            loss = runner.step({"input_ids": torch.tensor([[101, 7592, 102]]), "labels": torch.tensor([2])})
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        buckets: Buckets | None = None,
        max_grad_norm: float | None = None,
        autocast: torch.dtype | None = None,
        max_graphs: int = 64,
    ):
        """Take a model and its optimizer, whose learning rates become tensors where steps can be captured.

        Args:
            model: a PTuningV2Model in training mode, with one trained adapter active.
            optimizer: over the model's trained parameters; to be captured it must know `capturable` (AdamW, Adam).
            buckets: to which sizes batches are filled up.
            max_grad_norm: clip the gradient's norm to this.
            autocast: run the forward pass under autocast of this dtype.
            max_graphs: sizes beyond so many run eagerly.

        Raises:
            ValueError: autocast is float16, which needs a scaled loss.
        """
        _check_autocast("autocast", autocast)
        self._model = model
        self._optimizer = optimizer
        self._buckets = Buckets() if buckets is None else buckets
        self._max_grad_norm = max_grad_norm
        self._autocast = autocast
        self._max_graphs = max_graphs
        self._device = device_of(model.backbone)
        self._logged: set[str] = set()
        self._failure: str | None = None
        self._capture: Capture | None = None
        self._held: HeldOptimizer | None = None
        # What each batch's loss is multiplied by, and for how many batches a step that is.
        self._share, self._parts = torch.ones((), device=self._device), 1
        # Known after the first step.
        self._gradients: HeldGradients | None = None
        self._held_model: HeldModel | None = None
        self._observers: Observers | None = None
        self._relies_on: tuple | None = None
        # What is known as long as nobody changes the attributes beside it.
        self._looked: tuple[Look, Attributes] | None = None
        self._after_eager = False
        # The autocast that a step's passes run under, and whether algorithms are deterministic: kernels depend on both.
        self._state: tuple[torch.dtype | None, bool] = autocast, False
        self._known: dict[tuple, _Bucket] = {}
        self._updates = 0
        self._replay_update: Callable | None = None
        if reason := self._why_not_captured(model.step_plan()) or model.why_not_packed():
            self._log_once(f"steps run eagerly: {reason}")

    @property
    def captured(self) -> int:
        """How many sizes have been captured."""
        return sum(bucket.replay is not None for bucket in self._known.values())

    def step(self, *batches: Mapping[str, Tensor]) -> Tensor:
        """One optimizer step on the mean loss of the batches (several are accumulated): that loss, without gradient.

        Args:
            batches: each padded, on the CPU: input_ids, labels (start_positions and end_positions of spans), and
                attention_mask and token_type_ids where the model has them.

        Raises:
            ValueError: no batch is given, or one lacks labels or has labels that the task cannot read.
            ValueError: the optimizer has nothing that trains with the active adapter.
            RuntimeError: the model's adapters are disabled, or gradients are.
        """
        if not batches or any([batch.get("labels") is None and self._lacks_labels(batch) for batch in batches]):
            raise ValueError(f"batches must be one or more, each with labels; got {len(batches)}")
        if self._model._disabled:
            raise RuntimeError("a step must be taken outside disable_adapter(): within it nothing that trains runs")
        if not torch.is_grad_enabled():
            raise RuntimeError("a step must be taken outside no_grad() and inference_mode(): it computes gradients")
        around = autocast_of(self._device)
        if around is None:
            return self._step(batches, self._autocast)
        if self._autocast is None:
            _check_autocast("the autocast around a step", around)
        # Gradients are computed, and parameters updated, outside of it, as in any loop.
        with torch.autocast(self._device.type, enabled=False):
            return self._step(batches, self._autocast or around)

    def _step(self, batches: Sequence[Mapping[str, Tensor]], autocast: torch.dtype | None) -> Tensor:
        """One step whose forward passes run under autocast of a dtype, or under none."""
        self._state = autocast, torch.are_deterministic_algorithms_enabled()
        look = self._look()
        if look.plan.float8:
            self._model.renew_copies()
        packed = look.not_packed if look.task is None else packed_batches(self._model.packable, batches, look)
        if isinstance(packed, str):
            self._log_once(f"this step is neither packed nor captured: {packed}")
            return self._eager([moved(batch, self._device) for batch in batches], self._padded_loss)
        assert packed is not None, "what has no task says why"
        sized = [(batch, batch.filled(self._buckets, look.limit)) for batch in packed]
        reason = look.not_captured or why_not_now(self._device)
        if reason is None and self._observers is not None:
            reason = self._observers.found()
        if reason is not None:
            self._log_once(f"steps run eagerly: {reason}")
            if reason == self._failure:
                self._drop(reason)
        elif self._gradients is not None:
            loss = self._captured(sized, self._gradients)
            if loss is not None:
                return loss
        loss = self._eager([batch.packed(sizes).to(self._device) for batch, sizes in sized], self._model.packed_loss)
        if reason is None:
            self._gradients = HeldGradients(self._model, self._optimizer)
            self._held_model = HeldModel(self._model, self._optimizer)
            self._observers = self._observe()
            self._relies_on = look.relies_on
        return loss

    def _lacks_labels(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether a batch that has none by that name does not say what its loss compares."""
        adapter = self._model.adapters[self._model.active_adapter]
        return not TASKS[adapter.config.task_type].pools_itself and any(batch.get(name) is None for name in SPAN)

    def _observe(self) -> Observers:
        """Who watches what passes run."""
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        return Observers((*self._model.base_model.modules(), *self._model.adapters.modules()), trained)

    def _look(self) -> Look:
        """What the model says of this step; what would be wrong if it were replayed now is dropped."""
        if self._looked is not None:
            look, attributes = self._looked
            if attributes.same() and self._held_model is not None and self._held_model.changed() is None:
                return look
        # Asked for once in a step: it walks the model.
        plan = self._model.step_plan()
        look = Look.at(self._model, plan, self._why_not_captured(plan))
        self._looked = None
        if look.not_packed is None and look.not_captured is None and self._gradients is not None:
            if changed := self._what_changed(look):
                self._drop(changed)
            else:
                self._looked = look, Attributes(self._model)
        return look

    def _what_changed(self, look: Look) -> str | None:
        """What captured passes rely on and is not what it was; None where all is."""
        assert self._held_model is not None and self._relies_on is not None
        adapter, switches, task = self._relies_on
        if look.relies_on[0] != adapter:
            return "another adapter is active"
        if look.relies_on[2] != task:
            return "the adapter's head reads or solves otherwise"
        return "the model's switches changed" if look.relies_on[1] != switches else self._held_model.changed()

    def _captured(self, packed: list[tuple[OnHost, Hashable]], gradients: HeldGradients) -> Tensor | None:
        """One step of passes and an update, each replayed where it has been captured; None where others train now.

        Nothing has been updated then, and no gradient of the optimizer's is of use.
        """
        # That needs no answer before a pass which only replays, and adds to no gradient but the optimizer's.
        late = not gradients.has_others and all(self._is_replayed(sizes) for _, sizes in packed)
        if not late and self._others_train():
            return None
        if gradients.begin() and not self._after_eager:
            self._log_once("gradients that were set to None or replaced are put back: a step zeroes them itself")
        self._after_eager = False
        if self._parts != len(packed):
            self._share.fill_(1 / len(packed))
            self._parts = len(packed)
        losses = [self._pass(batch, sizes) for batch, sizes in packed]
        # The device is busy with the passes by now.
        if late and self._others_train():
            return None
        self._average_gradients()
        self._hold_optimizer()
        self._updates += 1
        if self._replay_update is None and self._updates > WARM_UP_STEPS:
            self._replay_update = self._capture_or_say(self._update, "the optimizer")
        if self._replay_update is None:
            self._run(self._update)
        else:
            self._replay_update()
        return sum(losses[1:], losses[0])

    def _others_train(self) -> bool:
        """Whether passes compute gradients that nobody wants now, or lack some; what was captured is dropped then."""
        assert self._held_model is not None
        changed = self._held_model.others_changed()
        if changed:
            self._drop(changed)
        return changed is not None

    def _is_replayed(self, sizes: Hashable) -> bool:
        bucket = self._known.get((self._state, sizes))
        return bucket is not None and bucket.replay is not None

    def _pass(self, batch: OnHost, sizes: Hashable) -> Tensor:
        """Forward and backward of one batch; its share of the loss."""
        bucket = self._known.get((self._state, sizes))
        if bucket is None:
            bucket = self._known[self._state, sizes] = _Bucket()
        bucket.passes += 1
        if bucket.replay is None and bucket.passes > WARM_UP_STEPS:
            if self.captured >= self._max_graphs:
                self._log_once(f"more than {self._max_graphs} sizes of batches: further ones run eagerly")
            else:
                staging = Staging(batch.packed(sizes), self._device)
                bucket.replay = self._capture_or_say(lambda: self._accumulate(staging.batch), "a pass")
                bucket.staging = staging if bucket.replay else None
        if bucket.replay is None or bucket.staging is None:
            on_device = batch.packed(sizes).to(self._device)
            return self._run(lambda: self._accumulate(on_device))
        bucket.staging.fill(partial(batch.write, sizes))
        loss = bucket.replay()
        assert loss is not None
        return loss.clone()

    def _accumulate(self, batch: StepBatch) -> Tensor:
        loss = self._loss(batch, self._model.packed_loss) * self._share
        loss.backward()
        return loss.detach()

    def _update(self) -> None:
        self._clip()
        self._optimizer.step()

    def _eager(self, batches: list, loss_of: Callable) -> Tensor:
        """One step without graphs, on batches on the device: the plain loop, with gradients of its own."""
        self._after_eager = True
        self._optimizer.zero_grad()
        losses = []
        for batch in batches:
            loss = self._loss(batch, loss_of) / len(batches)
            loss.backward()
            losses.append(loss.detach())
        check_gradients(self._optimizer, self._model.active_adapter)
        self._average_gradients()
        self._update()
        return sum(losses[1:], losses[0])

    def _loss(self, batch: Any, loss_of: Callable) -> Tensor:
        autocast, _ = self._state
        if autocast is None:
            return loss_of(batch)
        # Under capture nothing cached by autocast may outlive the graph.
        with torch.autocast(self._device.type, autocast, cache_enabled=False):
            return loss_of(batch)

    def _clip(self) -> None:
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(trained_by(self._optimizer), self._max_grad_norm)

    def _average_gradients(self) -> None:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        for parameter in trained_by(self._optimizer):
            # Sharded gradients have been averaged by who shards them.
            if parameter.grad is not None and not is_sharded(parameter.grad):
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def _hold_optimizer(self) -> None:
        """Drop an update that would be wrong if it were replayed now; bring learning rates to where it reads them."""
        if self._held is None:
            self._held = HeldOptimizer(self._optimizer, self._device, self._capturing().capturable)
        if reason := self._held.hold():
            self._drop_update(reason)

    def _drop(self, why: str) -> None:
        """Forget everything that was captured and the gradients it adds to: the next step is the first one again."""
        if self.captured or self._replay_update is not None:
            logger.info("graph runner: captured steps are dropped: %s", why)
        self._known, self._gradients, self._replay_update, self._updates = {}, None, None, 0
        self._held_model = self._observers = self._relies_on = self._looked = None

    def _drop_update(self, why: str) -> None:
        """Forget the captured update alone."""
        if self._replay_update is not None:
            logger.info("graph runner: the captured update is dropped: %s", why)
        self._replay_update, self._updates = None, 0

    def _capturing(self) -> Capture:
        """What captures; made when it is asked for, since it needs the device."""
        if self._capture is None:
            self._capture = CAPTURES[self._device.type](self._device)
        return self._capture

    def _run(self, call: Callable[[], T]) -> T:
        """Run a call as it will be captured; after a failed capture, away from the stream on which it failed."""
        return call() if self._failure is not None else self._capturing().warm_up(call)

    def _capture_or_say(self, call: Callable, what: str) -> Callable[[], Tensor | None] | None:
        """The replay of a call; None, and no further captures, where one is refused."""
        if self._failure is not None:
            return None
        try:
            return self._capturing()(call)
        except Exception as error:
            line = (str(error).strip().splitlines() or ["no reason given"])[0]
            self._looked = None
            self._failure = f"{what} could not be captured: {type(error).__name__}: {line}"
            self._log_once(f"steps run eagerly: {self._failure}")
            # Nothing has run, so what was added up before is as it was, wherever the call has put it.
            if self._gradients is not None:
                self._gradients.put_back()
            return None

    def _padded_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._model(**batch).loss

    def _why_not_captured(self, plan: StepPlan) -> str | None:
        if self._failure is not None:
            return self._failure
        if self._device.type not in CAPTURES:
            return f"the model is on the device type {self._device.type!r}, which has no CUDA graphs"
        if not plan.cuda_graphs:
            return "step_options.cuda_graphs is off, or the model is not training"
        if any("capturable" not in group for group in self._optimizer.param_groups):
            return f"{type(self._optimizer).__name__} cannot be captured"
        adapter = self._model.adapters[self._model.active_adapter]
        return why_not_layers(self._model.backbone) or why_not_modules(self._model.base_model, adapter)

    def _log_once(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            logger.info("graph runner: %s", line)


def _check_autocast(name: str, dtype: torch.dtype | None) -> None:
    """Refuse float16.

    Raises:
        ValueError: the dtype is that.
    """
    if dtype is torch.float16:
        raise ValueError(f"{name} must be torch.bfloat16 or None: float16 needs a scaled loss; got torch.float16")
