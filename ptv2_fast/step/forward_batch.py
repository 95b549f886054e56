"""The padded batch of a training forward, as a packed one and the way back for its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptv2_fast.losses import IGNORED_LABEL
from ptv2_fast.step.packed import INPUTS, Buckets, HostBatch, PackedBatch, Sizes, pack
from ptv2_fast.task_types import TASKS

# What a call may say beside the batch, if it says this.
_HARMLESS = {
    "output_hidden_states": (False,), "output_attentions": (False,), "output_router_logits": (False,),
    "use_cache": (False,), "return_dict": (True, False),
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where the logits of packed tokens stand in what a padded forward returns.

    Attributes:
        rows, tokens: B and N.
        index: (T,) the real tokens of the flattened (B, N), None where all are; unused where logits are of rows.
        of_rows: logits are (B, C), not (B, N, C).
    """

    rows: int
    tokens: int
    index: Tensor | None
    of_rows: bool

    def __call__(self, packed: Tensor) -> Tensor:
        """(R, C), of at least as many rows or tokens as there are -> (B, C) or (B, N, C), zero at padding."""
        if self.of_rows:
            return packed[: self.rows]
        count = self.rows * self.tokens
        if self.index is None:
            return packed[:count].unflatten(0, (self.rows, self.tokens))
        index = self.index.to(packed.device, non_blocking=True)
        padded = packed.new_zeros(count, *packed.shape[1:])
        return padded.index_copy(0, index, packed[: index.numel()]).unflatten(0, (self.rows, self.tokens))


@dataclass(frozen=True)
class ForwardBatch:
    """What a captured forward needs of its arguments.

    Attributes:
        host: the batch on the host.
        sizes: those that it is filled up to, which repeat.
        layout: of its logits.
        counted: how many labels stand behind the first column.
    """

    host: HostBatch
    sizes: Sizes
    layout: Layout
    counted: int

    def packed(self) -> PackedBatch:
        """The batch of its sizes, on the CPU."""
        return self.host.packed(self.sizes)


def why_not_read(inputs: Mapping[str, Any], labels: Any, task_type: str) -> str | None:
    """Why the arguments of a call are no padded batch of texts with labels, or ask for more; None where they are.

    Looks at no number, so nothing waits for the device.

    Args:
        inputs: without labels; what is None is not looked at.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    for name in sorted(given.keys() - set(INPUTS)):
        # Compared by identity: a tensor would be compared by its numbers.
        if not any(given[name] is value for value in _HARMLESS.get(name, ())):
            return f"the call has {name}"
    batch = {**{name: given[name] for name in INPUTS if name in given}, "labels": labels}
    if not all(isinstance(value, Tensor) for value in batch.values()) or "input_ids" not in batch:
        return "the batch is not made of tensors with input_ids among them"
    ids = batch["input_ids"]
    if ids.dim() != 2 or not ids.numel():
        return f"input_ids are not (B, N) but {tuple(ids.shape)}"
    shapes = {"labels": {ids.shape[:1] if TASKS[task_type].gives == "row" else ids.shape}}
    shapes["token_type_ids"] = {ids.shape, (1, ids.shape[1])}
    for name, value in batch.items():
        if value.shape not in shapes.get(name, {ids.shape}):
            return f"{name} has the shape {tuple(value.shape)} beside input_ids of {tuple(ids.shape)}"
        is_mask = name == "attention_mask"
        if value.is_complex() or not is_mask and (value.is_floating_point() or value.dtype == torch.bool):
            return f"{name} are not integers but {value.dtype}"
    return None


def read_batch(
    inputs: Mapping[str, Any],
    labels: Tensor,
    task: tuple[str, str],
    buckets: Buckets,
    limit: int | None,
    padding: int | None = None,
) -> ForwardBatch | str:
    """A call's batch, packed on the host; or why it cannot be. Waits for the device where the batch is there.

    Args:
        inputs: as `why_not_read` allows them.
        task: task type and pooling of a `PackedBatch`.
        limit: the longest text that the model takes.
        padding: the id by which the base itself finds padding where there is no mask.
    """
    names = [name for name in INPUTS if inputs.get(name) is not None]
    host = on_host({**{name: inputs[name] for name in names}, "labels": labels})
    ids, labels, mask = host["input_ids"], host["labels"], host.get("attention_mask")
    task_type, pooling = task
    gives = TASKS[task_type].gives
    index = None
    if mask is None and padding is not None and bool((ids == padding).any()):
        return "there is padding and no attention_mask"
    if mask is not None and not bool(mask.all()):
        if gives == "token" and bool(((mask == 0) & (labels != IGNORED_LABEL)).any()):
            return "there are labels at padding"
        index = mask.flatten().nonzero().flatten()
    packed = pack(host, task_type, pooling, whole=True)
    without = (packed.tokens == packed.index.size) & (packed.targets != IGNORED_LABEL)
    if gives == "row" and bool(without.any()):
        return "a row with a label has no token"
    layout = Layout(ids.shape[0], ids.shape[1], index, gives == "row")
    counted = 0 if labels.dim() == 1 else int((labels[:, 1:] != IGNORED_LABEL).sum())
    return ForwardBatch(packed, buckets.sizes(packed, limit), layout, counted)


def on_host(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors on the CPU; those that lie on one device come in one copy, as int64.

    Copies of those on the CPU too: a pass may run again after its caller has filled them with the next batch.
    """
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
