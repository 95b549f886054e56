"""Whole training steps captured in CUDA graphs, one for each size of batch that comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptv2_fast.prompts.source import count_step
from ptv2_fast.step.options import logger
from ptv2_fast.step.packed import INPUTS, Buckets, PackedBatch, pack

# A size runs this often eagerly, as real steps, before it is captured: kernels load and optimizer states appear.
WARM_UP_STEPS = 2


@dataclass
class _Bucket:
    """One combination of sizes: where its batches are copied to, and what replays its step."""

    buffers: list[PackedBatch]
    steps: int = 0
    replay: Callable[[], Tensor] | None = None


class GraphRunner:
    """Runs training steps: forward, backward and optimizer by one launch where a batch of the same sizes came before.

    Batches are packed on the host (no padding reaches the device), filled up to sizes that repeat, and copied into the
    buffers of their bucket. Steps of a new bucket run eagerly; the third one is captured and replayed from then on.
    Lengths stay on the device, so nothing in a step waits for the host. What cannot be captured or packed runs eagerly
    and gives the same losses; why is logged once.

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
        """Prepare the optimizer for capture: its learning rates become tensors that a scheduler fills.

        Args:
            model: a PTuningV2Model in training mode, with one trained adapter active.
            optimizer: over the model's trained parameters; to be captured it must know `capturable` (AdamW, Adam).
            buckets: to which sizes batches are filled up.
            max_grad_norm: clip the gradient's norm to this.
            autocast: run the forward pass under autocast of this dtype.
            max_graphs: buckets beyond so many run eagerly.
        """
        self._model = model
        self._optimizer = optimizer
        self._buckets = Buckets() if buckets is None else buckets
        self._max_grad_norm = max_grad_norm
        self._autocast = autocast
        self._max_graphs = max_graphs
        self._known: dict[tuple, _Bucket] = {}
        self._logged: set[str] = set()
        self._device = model.backbone.device
        self._capture = None
        reason = self._why_not_captured()
        if reason is None:
            self._capture = _CudaCapture(self._device)
            _make_capturable(optimizer, self._device)
        else:
            self._say(f"steps run eagerly: {reason}")

    @property
    def captured(self) -> int:
        """How many buckets have been captured."""
        return sum(bucket.replay is not None for bucket in self._known.values())

    def step(self, *batches: Mapping[str, Tensor]) -> Tensor:
        """One optimizer step on the mean loss of the batches (several are accumulated): that loss, without gradient.

        Args:
            batches: each padded, on the CPU: input_ids, labels, and attention_mask and token_type_ids where the model
                has them.

        Raises:
            ValueError: no batch is given, or one lacks labels.
        """
        if not batches or any(batch.get("labels") is None for batch in batches):
            raise ValueError(f"batches must be one or more, each with labels; got {len(batches)}")
        reason = self._why_not_packed(batches)
        if reason is not None:
            self._say(f"this step is neither packed nor captured: {reason}")
            return self._run([_moved(batch, self._device) for batch in batches], self._padded_loss)
        task_type, pooling = self._model.packed_task()
        packed = [self._buckets.fill(pack(batch, task_type, pooling)) for batch in batches]
        if self._capture is None:
            return self._run([batch.to(self._device) for batch in packed], self._model.packed_loss)
        return self._bucketed(packed)

    def _bucketed(self, packed: list[PackedBatch]) -> Tensor:
        key = tuple(batch.sizes for batch in packed)
        bucket = self._known.get(key)
        if bucket is None:
            if len(self._known) >= self._max_graphs:
                self._say(f"more than {self._max_graphs} sizes of batches: further ones run eagerly")
                return self._run([batch.to(self._device) for batch in packed], self._model.packed_loss)
            bucket = self._known[key] = _Bucket([batch.to(self._device) for batch in packed])
        for buffer, batch in zip(bucket.buffers, packed):
            _copy_into(buffer, batch)
        bucket.steps += 1
        if bucket.steps <= WARM_UP_STEPS:
            return self._capture.warm_up(lambda: self._run(bucket.buffers, self._model.packed_loss))
        if bucket.replay is None:
            self._optimizer.zero_grad(set_to_none=True)
            bucket.replay = self._capture(lambda: self._run(bucket.buffers, self._model.packed_loss))
        loss = bucket.replay().clone()
        # The optimizer's hook does not run in a replay, and what was kept of the prompts is stale.
        count_step()
        return loss

    def _run(self, batches: list, loss_of: Callable) -> Tensor:
        """One step on batches on the device."""
        self._optimizer.zero_grad(set_to_none=True)
        total = None
        for batch in batches:
            # Under capture nothing cached by autocast may outlive the graph.
            context = torch.autocast(self._device.type, self._autocast, cache_enabled=False)
            with context if self._autocast is not None else nullcontext():
                loss = loss_of(batch)
            loss = loss / len(batches)
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        if self._max_grad_norm is not None:
            trained = [p for group in self._optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self._max_grad_norm)
        self._optimizer.step()
        return total

    def _padded_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._model(**batch).loss

    def _why_not_packed(self, batches) -> str | None:
        reason = self._model.why_not_packed()
        if reason is not None:
            return reason
        others = {name for batch in batches for name, value in batch.items() if value is not None} - set(INPUTS)
        if others:
            return f"the batch has {', '.join(sorted(others))}"
        masks = [batch.get("attention_mask") for batch in batches]
        return "attention_mask is not (B, N)" if any(m is not None and m.dim() != 2 for m in masks) else None

    def _why_not_captured(self) -> str | None:
        if self._device.type != "cuda":
            return f"the model is on the device type {self._device.type!r}, which has no CUDA graphs"
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

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
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


def _make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep the step count and the learning rate on the device, where a graph reads them."""
    for group in optimizer.param_groups:
        group["capturable"] = True
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(device)


def _copy_into(buffer: PackedBatch, batch: PackedBatch) -> None:
    for name, tensor in batch.tensors().items():
        getattr(buffer, name).copy_(tensor, non_blocking=True)


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
