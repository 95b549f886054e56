"""What the tasks that can be packed share: training forwards that are captured and replayed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptv2_fast.backbone.tokens import gather_tokens
from ptv2_fast.step.captured_forward import CapturedForward
from ptv2_fast.step.host_batch import with_labels
from ptv2_fast.step.packed import PackedBatch, PackedTask, packed_inputs
from ptv2_fast.task_models.task_model import TaskModel


class CapturedModel(TaskModel):
    """What the tasks that can be packed share: training forwards that are captured and replayed."""

    @abstractmethod
    def packed_task(self) -> PackedTask:
        """By what a batch is packed for the active adapter."""

    @abstractmethod
    def packed_output(self, packed: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """The mean loss of a packed batch, as that of the padded one, and its logits; nothing waits for the device.

        Returns:
            The loss () and the logits: (K, C) of rows, (R, C) of the tokens that are read, (K, W, 2) of the slots of
            rows with spans; (K, W, D) pooled states; None for CAUSAL_LM.

        Raises:
            ValueError: `why_not_packed` says why.
        """

    def packed_outputs(self, packed: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a batch, and all that the task's forward gives beside it."""
        loss, logits = self.packed_output(packed)
        return loss, () if logits is None else (logits,)

    def packable(self, batch: Mapping[str, Any], task: PackedTask) -> Mapping[str, Any]:
        """A padded batch of the forward's arguments with labels by that name, and what else is derived of them."""
        return with_labels(batch, task)

    def packed_loss(self, packed: Any) -> Tensor:
        """The mean loss of a packed batch, as that of the padded one; nothing in it waits for the device.

        Raises:
            ValueError: `why_not_packed` says why.
        """
        return self.packed_outputs(packed)[0]

    def packed_states(self, packed: PackedBatch) -> Tensor:
        """(R, D) the backbone's last states of the tokens that a packed batch reads; zero where it reads none."""
        output = self.run(self.backbone, packed_inputs(packed), read=packed.tokens)
        states = gather_tokens(output.last_hidden_state, packed.tokens)[0]
        return states * (packed.tokens < packed.input_ids.shape[1])[:, None]

    def packed_rows(self, packed: PackedBatch, pooling: str) -> tuple[Tensor, Tensor | None]:
        """What a head that pools this way finds of each row that a packed batch reads, in a padded form of its own.

        Returns:
            States (R, 1, D) of the token that is read, and None; by "mean" (R, n, D) of all tokens, zero behind them,
            and the mask (R, n) of those. A row without a token has one, of zeros.
        """
        if pooling != "mean":
            return self.packed_states(packed)[:, None], None
        hidden = self.run(self.backbone, packed_inputs(packed)).last_hidden_state
        bounds, count = packed.cu_seqlens, packed.tokens.shape[0]
        row = torch.arange(count, device=bounds.device).clamp(max=bounds.shape[0] - 2)
        begins, ends = bounds[row, None], bounds[row + 1, None]
        places = begins + torch.arange(packed.longest, device=bounds.device)
        states = gather_tokens(hidden, places.flatten())[0].unflatten(0, places.shape)
        mask = places < ends
        return states.masked_fill(~mask[..., None], 0), mask | (places == begins)

    def _may_capture(self) -> bool:
        """Whether a forward with labels is one of a training step, which may be captured."""
        trains = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return trains and not self._disabled

    def _captured(
        self,
        inputs: Mapping[str, Any],
        labels: Any,
        adapter_names: Sequence[str] | None,
        items: Tensor | int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The loss of a forward that `_may_capture`, and what is given beside it, logits first; None where it runs as
        any other does.

        Args:
            inputs: keyword arguments of the forward, without labels.
            items: Trainer's count of labels, of all accumulated batches.
        """
        if labels is None:
            return None
        if adapter_names is not None:
            inputs = {**inputs, "adapter_names": adapter_names}
        # Made by the first of several threads.
        captured = self.__dict__.get("_captured_forward")
        if captured is None:
            captured = self.__dict__.setdefault("_captured_forward", CapturedForward())
        return captured(self, inputs, labels, items)
