"""The padded batch of a training forward, as a packed one and the way back for its logits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptv2_fast.losses import IGNORED_LABEL
from ptv2_fast.step.host_batch import INPUTS, pack, why_not_as_padded, why_not_labels
from ptv2_fast.step.packed import Buckets, OnHost, PackedTask, StepBatch
from ptv2_fast.step.padded import PADDED_INPUTS, pad, why_not_padded

# What a call may say beside the batch, if it says this.
_HARMLESS = {
    "output_hidden_states": (False,), "output_attentions": (False,), "output_router_logits": (False,),
    "use_cache": (False,), "return_dict": (True, False),
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where the logits of a packed batch stand in what a padded forward returns.

    Attributes:
        gives: what they are of, as `TaskType.gives`.
        rows, tokens: B and N; B is the number of examples where these are rows.
        index: (T,) the real tokens of the flattened (B, N), None where all are; used where logits are of tokens.
    """

    gives: str
    rows: int
    tokens: int
    index: Tensor | None

    def __call__(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All that a pass gives beside its loss, as a padded forward has it."""
        return tuple(map(self._placed, outputs))

    def _placed(self, packed: Tensor) -> Tensor:
        """Logits of at least as many rows, slots or tokens as there are, as a padded forward has them.

        (K, ...) of rows -> (B, ...), (K, W, 2) of slots -> (B, N, 2), (T, C) of tokens -> (B, N, C), zero at padding.
        """
        if self.gives == "row":
            return packed[: self.rows]
        if self.gives == "span":
            return packed[: self.rows, : self.tokens]
        count = self.rows * self.tokens
        if self.index is None:
            return packed[:count].unflatten(0, (self.rows, self.tokens))
        index = self.index.to(packed.device, non_blocking=True)
        padded = packed.new_zeros(count, *packed.shape[1:])
        return padded.index_copy(0, index, packed[: index.numel()]).unflatten(0, (self.rows, self.tokens))


@dataclass(frozen=True)
class Slots:
    """Where logits of M tokens that are written, and states of N tokens of the text, stand in rows that were filled."""

    written: int
    tokens: int

    def __call__(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits (B, M', V) and states (B, N', D) -> (B, M, V) and (B, N, D)."""
        logits, states = outputs
        return logits[:, : self.written], states[:, : self.tokens]


@dataclass(frozen=True)
class ForwardBatch:
    """What a captured forward needs of its arguments.

    Attributes:
        host: the batch on the host.
        sizes: those that it is filled up to, which repeat.
        layout: of what a pass gives beside its loss.
        counted: how many labels of a text stand behind the first column.
    """

    host: OnHost
    sizes: Hashable
    layout: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    counted: int

    def packed(self) -> StepBatch:
        """The batch of its sizes, on the CPU."""
        return self.host.packed(self.sizes)


def why_not_read(inputs: Mapping[str, Any], labels: Any, task: PackedTask) -> str | None:
    """Why the arguments of a call are no padded batch of texts with labels, or ask for more; None where they are.

    Looks at no number, so nothing waits for the device.

    Args:
        inputs: without labels; what is None is not looked at.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    for name in sorted(given.keys() - set(PADDED_INPUTS if task.is_padded else INPUTS)):
        # Compared by identity: a tensor would be compared by its numbers.
        if not any(given[name] is value for value in _HARMLESS.get(name, ())):
            return f"the call has {name}"
    if task.is_padded:
        return why_not_padded({**given, "labels": labels})
    batch = {name: given[name] for name in INPUTS if name in given}
    if not all(isinstance(value, Tensor) for value in batch.values()) or "input_ids" not in batch:
        return "the batch is not made of tensors with input_ids among them"
    ids = batch["input_ids"]
    if ids.dim() != 2 + task.in_groups or not ids.numel():
        return f"input_ids are not {'(B, C, N)' if task.in_groups else '(B, N)'} but {tuple(ids.shape)}"
    # A text's token types may be one row for all.
    shapes = {"token_type_ids": {ids.shape, *([] if task.in_groups else [(1, ids.shape[1])])}}
    for name, value in batch.items():
        if value.shape not in shapes.get(name, {ids.shape}):
            return f"{name} has the shape {tuple(value.shape)} beside input_ids of {tuple(ids.shape)}"
        is_mask = name == "attention_mask"
        if value.is_complex() or not is_mask and (value.is_floating_point() or value.dtype == torch.bool):
            return f"{name} are not integers but {value.dtype}"
    return why_not_labels(labels, (ids.shape[0], ids.shape[-1]), task)


def read_batch(
    inputs: Mapping[str, Any],
    labels: Tensor,
    task: PackedTask,
    buckets: Buckets,
    limit: int | None,
    padding: int | None = None,
    unpads: bool = True,
) -> ForwardBatch | str:
    """A call's batch, packed on the host; or why it cannot be. Waits for the device where the batch is there.

    Args:
        inputs: as `why_not_read` allows them.
        task: of a `PackedBatch`.
        limit: the longest text that the model takes.
        padding: the id by which the base itself finds padding where there is no mask.
        unpads: whether the model's own forward has zeros for the states of padding.
    """
    names = [name for name in (PADDED_INPUTS if task.is_padded else INPUTS) if inputs.get(name) is not None]
    host = on_host({**{name: inputs[name] for name in names}, "labels": labels})
    if task.is_padded:
        padded = pad(host)
        return ForwardBatch(
            padded, padded.filled(buckets, limit), Slots(labels.shape[1], host["input_ids"].shape[1]), 0
        )
    packed = pack(host, task, whole=True)
    if reason := why_not_as_padded(packed, host, task, padding, unpads):
        return reason
    has_padding = packed.index.size < packed.input_ids.size
    index = torch.from_numpy(packed.index) if has_padding else None
    ids, labels = host["input_ids"], host["labels"]
    counted = int((labels[:, 1:] != IGNORED_LABEL).sum()) if task.gives == "text" else 0
    layout = Layout(task.gives, ids.shape[0], ids.shape[-1], index)
    return ForwardBatch(packed, packed.filled(buckets, limit), layout, counted)


def on_host(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors on the CPU; those that lie on one device come in one copy, as int64, but labels that are
    numbers, which are float32.

    Copies of those on the CPU too: a pass may run again after its caller has filled them with the next batch.
    """
    labels = batch["labels"]
    if labels.is_floating_point():
        bits = labels.float().view(torch.int32)
        host = on_host({**batch, "labels": bits})
        return {**host, "labels": host["labels"].int().view(torch.float32)}
    own = {name: tensor.clone() for name, tensor in batch.items() if tensor.device.type == "cpu"}
    away = {name: tensor for name, tensor in batch.items() if name not in own}
    if len({tensor.device for tensor in away.values()}) > 1:
        return own | {name: tensor.cpu() for name, tensor in away.items()}
    return own | (dict(zip(away, in_one_copy(list(away.values())), strict=True)) if away else {})


def in_one_copy(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Integers, or a mask, that lie on one device: on the CPU as int64."""
    # A mask of fractions is one of what they are nonzero at.
    whole = [tensor.bool() if tensor.is_floating_point() else tensor for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1).long() for tensor in whole]).cpu()
    return [
        part.view(one.shape) for part, one in zip(flat.split([one.numel() for one in tensors]), tensors, strict=True)
    ]
