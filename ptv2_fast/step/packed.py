"""A padded batch of training rows as packed tokens with the targets of its loss, in sizes that repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_fast.heads import IGNORED_LABEL
from ptv2_fast.models.pooling import pooled_tokens
from ptv2_fast.step.labelled_rows import labelled_tokens, predictable_labels
from ptv2_fast.step.unpad import Packing

# What a packed batch is made of; anything else in a batch cannot be packed.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")


@dataclass(frozen=True)
class PackedBatch:
    """Rows of text without padding, one after the other, and what their loss compares.

    Attributes:
        input_ids: (1, T).
        token_type_ids: (1, T) or None.
        cu_seqlens: (S + 1,) int32: where each row begins; rows may be empty.
        longest: no row has more tokens.
        tokens: (R,) the tokens of T whose last states are read; T stands for none, whose state is zero.
        targets: (R,) their labels, -100 where there is none.
    """

    input_ids: Tensor
    token_type_ids: Tensor | None
    cu_seqlens: Tensor
    longest: int
    tokens: Tensor
    targets: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int, bool]:
        """(T, S, longest, R, token types): two batches of the same sizes run the same kernels."""
        return (
            self.input_ids.shape[1],
            self.cu_seqlens.shape[0] - 1,
            self.longest,
            self.targets.shape[0],
            self.token_type_ids is not None,
        )

    def to(self, device: torch.device) -> PackedBatch:
        """On another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def pack(batch: Mapping[str, Tensor], task_type: str, pooling: str = "first") -> PackedBatch:
    """Pack a padded batch.

    Args:
        batch: input_ids and labels, with attention_mask and token_type_ids where there are any, on the CPU: lengths
            are read here, on the host.
        task_type: SEQ_CLS (labels (B,)), TOKEN_CLS or CAUSAL_LM (labels (B, N)).
        pooling: "first" or "last": which token's state a SEQ_CLS head reads.

    Raises:
        ValueError: labels are no integers, or of another shape.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    shape = ids.shape[:1] if task_type == "SEQ_CLS" else ids.shape
    if labels.is_floating_point() or labels.shape != shape:
        raise ValueError(f"labels must be integers of shape {tuple(shape)}; got {labels.dtype} {tuple(labels.shape)}")
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    packing = Packing.of(mask)
    if task_type == "SEQ_CLS":
        rows, tokens = ids.shape
        read, targets = pooled_tokens(rows, tokens, mask, pooling, ids.device), labels
    elif task_type == "TOKEN_CLS":
        read = (labels.flatten() != IGNORED_LABEL).nonzero().flatten()
        targets = labels.flatten().index_select(0, read)
    else:
        read, targets = labelled_tokens(predictable_labels(labels, mask))
    types = batch.get("token_type_ids")
    return PackedBatch(
        input_ids=packing.pack(ids),
        token_type_ids=None if types is None else packing.pack(types),
        cu_seqlens=packing.cu_seqlens,
        longest=max(packing.longest, 1),
        tokens=packing.places(read),
        targets=targets.long(),
    )


def packed_inputs(packed: PackedBatch) -> dict[str, Tensor | int]:
    """What a wrapped model is called with; the names of the boundaries are transformers' own."""
    inputs = {
        "input_ids": packed.input_ids,
        "token_type_ids": packed.token_type_ids,
        "cu_seq_lens_q": packed.cu_seqlens,
        "max_length_q": packed.longest,
    }
    return {name: value for name, value in inputs.items() if value is not None}


def packed_labels(packed: PackedBatch) -> Tensor:
    """(1, T) the targets beside their tokens, -100 elsewhere."""
    tokens = packed.input_ids.shape[1]
    labels = packed.targets.new_full((tokens + 1,), IGNORED_LABEL)
    return labels.index_copy(0, packed.tokens, packed.targets)[None, :tokens]


@dataclass(frozen=True)
class Buckets:
    """To which sizes packed batches are filled up, so that few different ones occur.

    Small counts become multiples of the numbers here, larger ones of ever larger powers of two: at most about an
    eighth is filling, and from each power of two to the next there are eight sizes. The longest row is taken as the
    next power of two.

    Attributes:
        tokens, rows, targets: the smallest steps of T, S and R.
    """

    tokens: int = 64
    rows: int = 8
    targets: int = 32

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name} must be a positive integer; got {value!r}")

    def fill(self, packed: PackedBatch, limit: int | None = None) -> PackedBatch:
        """The batch with rows that nobody reads behind its own, up to the next sizes.

        Args:
            limit: the longest text that the model takes.
        """
        count, rows, longest, read, _ = packed.sizes
        longest = max(16, 1 << (longest - 1).bit_length())
        longest = longest if limit is None else max(min(longest, limit), packed.longest)
        tokens = _next_size(count, self.tokens)
        # Tokens of no text are rows too, none longer than the longest one may be. How many there are may depend on
        # the sizes alone.
        spare = _next_size(rows, self.rows) + -(-_step(tokens, self.tokens) // longest) - rows
        ends = torch.arange(1, spare + 1, dtype=torch.int32) * longest + count
        ends = ends.clamp(max=tokens)
        targets = _next_size(read, self.targets)
        types = packed.token_type_ids
        # "No token" was T, and is the new T.
        places = torch.where(packed.tokens < count, packed.tokens, tokens)
        return PackedBatch(
            input_ids=F.pad(packed.input_ids, (0, tokens - count)),
            token_type_ids=None if types is None else F.pad(types, (0, tokens - count)),
            cu_seqlens=torch.cat([packed.cu_seqlens, ends]),
            longest=longest,
            tokens=F.pad(places, (0, targets - read), value=tokens),
            targets=F.pad(packed.targets, (0, targets - read), value=IGNORED_LABEL),
        )


def _next_size(count: int, smallest: int) -> int:
    """The next multiple of the step that belongs to a count."""
    step = _step(count, smallest)
    return max(-(-count // step), 1) * step


def _step(count: int, smallest: int) -> int:
    """`smallest`, doubled while it is less than a sixteenth of the count."""
    step = smallest
    while 16 * step < count:
        step *= 2
    return step
