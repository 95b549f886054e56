"""Whole training steps captured in CUDA graphs, one for each size of batch that comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ptv2_fast.models.gathered import device_of, is_sharded
from ptv2_fast.prompts.source import count_step
from ptv2_fast.step.options import logger
from ptv2_fast.step.packed import INPUTS, Buckets, PackedBatch, pack

# A size runs this often eagerly, as real steps, before it is captured: kernels load and optimizer states appear.
WARM_UP_STEPS = 2
T = TypeVar("T")


@dataclass
class _Bucket:
    """One size of batches: how often it came, where its batches are copied to, and what replays its pass."""

    passes: int = 0
    buffers: PackedBatch | None = None
    replay: Callable[[], Tensor] | None = None


class GraphRunner:
    """Runs training steps with one launch for a forward and backward pass, and one for the optimizer.

    Batches are packed on the host (no padding reaches the device), filled up to sizes that repeat, and copied into the
    buffers of their size. The first two passes of a size run eagerly; the third is captured and replayed from then on.
    Lengths stay on the device, so nothing in a step waits for the host. What cannot be captured or packed runs eagerly
    and gives the same losses; why is logged once. A step runs again from scratch what has changed since: another
    adapter, other switches, a reloaded optimizer. Learning rates may change at every step; betas and weight decay are
    what they were at the first capture. In a distributed job gradients are averaged over the processes.

        runner = GraphRunner(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        for batch in batches:        # padded, on the CPU
            loss = runner.step(batch)
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
        if autocast is torch.float16:
            raise ValueError("autocast must be torch.bfloat16 or None: float16 needs a scaled loss; got torch.float16")
        self._model = model
        self._optimizer = optimizer
        self._buckets = Buckets() if buckets is None else buckets
        self._max_grad_norm = max_grad_norm
        self._autocast = autocast
        self._max_graphs = max_graphs
        self._device = device_of(model.backbone)
        self._logged: set[str] = set()
        self._failure: str | None = None
        self._capture: _CudaCapture | None = None
        self._rates: list[Tensor] = []
        # What passes add their gradients to, at the same addresses for ever; known after the first step.
        self._gradients: list[tuple[nn.Parameter, Tensor]] | None = None
        self._seen: tuple | None = None
        self._known: dict[tuple, _Bucket]
        self._updates: int
        self._replay_update: Callable | None
        self._share: Tensor
        self._forget()
        if reason := self._why_not_captured():
            self._say(f"steps run eagerly: {reason}")

    @property
    def captured(self) -> int:
        """How many sizes have been captured."""
        return sum(bucket.replay is not None for bucket in self._known.values())

    def step(self, *batches: Mapping[str, Tensor]) -> Tensor:
        """One optimizer step on the mean loss of the batches (several are accumulated): that loss, without gradient.

        Args:
            batches: each padded, on the CPU: input_ids, labels, and attention_mask and token_type_ids where the model
                has them.

        Raises:
            ValueError: no batch is given, or one lacks labels or has labels that the task cannot read.
        """
        if not batches or any(batch.get("labels") is None for batch in batches):
            raise ValueError(f"batches must be one or more, each with labels; got {len(batches)}")
        if reason := self._why_not_packed(batches):
            self._say(f"this step is neither packed nor captured: {reason}")
            return self._eager([_moved(batch, self._device) for batch in batches], self._padded_loss)
        task_type, pooling = self._model.packed_task()
        limit = self._model.text_limit()
        packed = [self._buckets.fill(pack(batch, task_type, pooling), limit) for batch in batches]
        reason = self._why_not_captured()
        if reason is not None or self._gradients is None:
            if reason is not None:
                self._say(f"steps run eagerly: {reason}")
            loss = self._eager([batch.to(self._device) for batch in packed], self._model.packed_loss)
            if reason is None:
                self._hold_gradients()
            return loss
        return self._captured(packed)

    def _captured(self, packed: list[PackedBatch]) -> Tensor:
        """One step of passes and an update, each replayed where it has been captured."""
        capture = self._capturing()
        self._hold_rates()
        if self._state() != self._seen:
            self._forget()
            self._seen = self._state()
        self._share.fill_(1 / len(packed))
        losses = [self._pass(batch) for batch in packed]
        self._average_gradients()
        self._updates += 1
        if self._updates <= WARM_UP_STEPS:
            capture.warm_up(self._update)
        else:
            if self._replay_update is None:
                self._replay_update = self._capture_or_say(self._update, "the optimizer") or self._update
            self._replay_update()
        # An optimizer's hook does not run in a replay, and what was kept of the prompts is stale.
        count_step()
        return sum(losses[1:], losses[0])

    def _pass(self, batch: PackedBatch) -> Tensor:
        """Forward and backward of one batch; its share of the loss."""
        bucket = self._known.setdefault(batch.sizes, _Bucket())
        bucket.passes += 1
        may_capture = bucket.passes > WARM_UP_STEPS and self._failure is None
        if may_capture and bucket.replay is None:
            if self.captured >= self._max_graphs:
                self._say(f"more than {self._max_graphs} sizes of batches: further ones run eagerly")
                may_capture = False
            else:
                buffers = bucket.buffers = batch.to(self._device)
                bucket.replay = self._capture_or_say(lambda: self._accumulate(buffers), "a pass")
        if not may_capture or bucket.replay is None or bucket.buffers is None:
            on_device = batch.to(self._device)
            return self._capturing().warm_up(lambda: self._accumulate(on_device))
        _copy_into(bucket.buffers, batch)
        return bucket.replay().clone()

    def _accumulate(self, batch: PackedBatch) -> Tensor:
        loss = self._loss(batch, self._model.packed_loss) * self._share
        loss.backward()
        return loss.detach()

    def _update(self) -> None:
        self._clip()
        self._optimizer.step()
        for _, gradient in self._gradients or ():
            gradient.zero_()

    def _eager(self, batches: list, loss_of: Callable) -> Tensor:
        """One step without graphs, on batches on the device."""
        self._optimizer.zero_grad(set_to_none=self._gradients is None)
        losses = []
        for batch in batches:
            loss = self._loss(batch, loss_of) / len(batches)
            loss.backward()
            losses.append(loss.detach())
        self._average_gradients()
        self._clip()
        self._optimizer.step()
        if self._gradients is not None:
            self._optimizer.zero_grad(set_to_none=False)
        return sum(losses[1:], losses[0])

    def _loss(self, batch: Any, loss_of: Callable) -> Tensor:
        if self._autocast is None:
            return loss_of(batch)
        # Under capture nothing cached by autocast may outlive the graph.
        with torch.autocast(self._device.type, self._autocast, cache_enabled=False):
            return loss_of(batch)

    def _clip(self) -> None:
        if self._max_grad_norm is not None:
            trained = [p for group in self._optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self._max_grad_norm)

    def _average_gradients(self) -> None:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                # Sharded gradients have been averaged by who shards them.
                if parameter.grad is not None and not is_sharded(parameter.grad):
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()

    def _hold_gradients(self) -> None:
        """Keep the gradients that an eager step made, at zero: from here on passes add to them."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        for _, gradient in self._gradients:
            gradient.zero_()

    def _hold_rates(self) -> None:
        """Keep step counts and learning rates on the device, at the same addresses, whatever a scheduler writes."""
        groups = self._optimizer.param_groups
        if len(self._rates) != len(groups):
            self._rates = [torch.zeros((), dtype=torch.float32, device=self._device) for _ in groups]
        for group, rate in zip(groups, self._rates):
            group["capturable"] = True
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate
        for state in self._optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(self._device)

    def _state(self) -> tuple:
        """What the graphs have taken the addresses of, or have taken for granted."""
        held = [(id(parameter.grad), parameter.data_ptr()) for parameter, _ in self._gradients or ()]
        states = [id(value) for state in self._optimizer.state.values() for value in state.values()]
        model = self._model
        base = next(model.backbone.parameters())
        return (held, states, model.active_adapter, model.training, model.step_plan(), base.data_ptr(), base.dtype)

    def _forget(self) -> None:
        """Drop every graph."""
        self._known = {}
        self._updates = 0
        self._replay_update = None
        self._share = torch.ones((), device=self._device)
        for parameter, gradient in self._gradients or ():
            gradient.zero_()
            parameter.grad = gradient

    def _capturing(self) -> _CudaCapture:
        """What captures; made when it is asked for, since it needs CUDA."""
        if self._capture is None:
            self._capture = _CudaCapture(self._device)
        return self._capture

    def _capture_or_say(self, call: Callable, what: str) -> Callable | None:
        """The replay of a call; None, and no further captures, where the device refuses one."""
        try:
            return self._capturing()(call)
        except RuntimeError as error:
            self._failure = f"{what} could not be captured: {str(error).splitlines()[0]}"
            self._say(self._failure)
            return None

    def _padded_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._model(**batch).loss

    def _why_not_packed(self, batches: Sequence[Mapping[str, Tensor]]) -> str | None:
        reason = self._model.why_not_packed()
        if reason is not None:
            return reason
        if gathered_by := self._model.step_plan().gathered_by:
            return f"only the model's own forward brings the weights: {gathered_by}"
        others = {name for batch in batches for name, value in batch.items() if value is not None} - set(INPUTS)
        if others:
            return f"the batch has {', '.join(sorted(others))}"
        masks = [batch.get("attention_mask") for batch in batches]
        return "attention_mask is not (B, N)" if any(m is not None and m.dim() != 2 for m in masks) else None

    def _why_not_captured(self) -> str | None:
        if self._failure is not None:
            return self._failure
        if self._device.type != "cuda":
            return f"the model is on the device type {self._device.type!r}, which has no CUDA graphs"
        if not self._model.step_plan().cuda_graphs:
            return "step_options.cuda_graphs is off, or the model is not training"
        if any("capturable" not in group for group in self._optimizer.param_groups):
            return f"{type(self._optimizer).__name__} cannot be captured"
        if getattr(self._model.backbone, "gradient_checkpointing", False):
            return "gradient checkpointing reads the random state, which a capture forbids"
        return self._model.why_not_packed()

    def _say(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            logger.info("graph runner: %s", line)


class _CudaCapture:
    """Captures calls in CUDA graphs that share one memory pool: their replays never overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, call: Callable[[], T]) -> T:
        """Run a call on the stream on which it will be captured."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)
        return result

    def __call__(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture a call without running it; what comes back runs it and returns the same tensor each time."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = call()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def _copy_into(buffer: PackedBatch, batch: PackedBatch) -> None:
    for name, tensor in batch.tensors().items():
        getattr(buffer, name).copy_(tensor, non_blocking=True)


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
