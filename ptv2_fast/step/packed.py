"""A padded batch of training rows as packed tokens with the targets of its loss, in sizes that repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptv2_fast.heads import IGNORED_LABEL

# What a packed batch is made of; anything else in a batch cannot be packed.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")
_TENSORS = ("input_ids", "token_type_ids", "cu_seqlens", "tokens", "targets")
Array = NDArray[Any]


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
        return {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}


def pack(
    batch: Mapping[str, Tensor], task_type: str, pooling: str = "first", *, whole: bool = False
) -> PackedBatch:
    """Pack a padded batch.

    Args:
        batch: input_ids and labels, with attention_mask and token_type_ids where there are any, on the CPU: lengths
            are read here, on the host.
        task_type: SEQ_CLS (labels (B,)), TOKEN_CLS or CAUSAL_LM (labels (B, N)).
        pooling: "first" or "last": which token's state a SEQ_CLS head reads.
        whole: TOKEN_CLS reads every real token and no other, labelled or not.

    Raises:
        ValueError: labels are no integers, or of another shape; or attention_mask is.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    shape = ids.shape[:1] if task_type == "SEQ_CLS" else ids.shape
    if labels.is_floating_point() or labels.shape != shape:
        raise ValueError(f"labels must be integers of shape {tuple(shape)}; got {labels.dtype} {tuple(labels.shape)}")
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have input_ids' shape {tuple(ids.shape)}; got {tuple(mask.shape)}")
    # In numpy: on arrays this small a tensor's operation takes longer to call than to run.
    rows, tokens = ids.shape
    real = np.ones((rows, tokens), bool) if mask is None else mask.bool().numpy()
    index = real.ravel().nonzero()[0]
    bounds = index.searchsorted(np.arange(rows + 1) * tokens)
    lengths = bounds[1:] - bounds[:-1]
    targets = labels.long().numpy()
    if task_type == "SEQ_CLS":
        # What `pooled_tokens` gives, among the real tokens.
        places = np.where(lengths > 0, bounds[:-1] if pooling == "first" else bounds[1:] - 1, index.size)
    elif task_type == "TOKEN_CLS" and whole:
        places, targets = np.arange(index.size), targets.ravel()[index]
    else:
        read, targets = _labelled(targets) if task_type == "TOKEN_CLS" else _predicted(targets, real)
        places = _places(read, index, real.size)
    types = batch.get("token_type_ids")
    return PackedBatch(
        input_ids=_packed(ids, rows, index),
        token_type_ids=None if types is None else _packed(types, rows, index),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        longest=int(lengths.max(initial=1)),
        tokens=torch.from_numpy(places),
        targets=torch.from_numpy(targets),
    )


def _packed(padded: Tensor, rows: int, index: Array) -> Tensor:
    """(B or 1, N) -> (1, T): the real tokens, which stand at `index` (T,) of the flattened (B, N)."""
    whole = padded if padded.shape[0] == rows else padded.expand(rows, -1)
    return torch.from_numpy(whole.numpy().reshape(-1)[index][None])


def _labelled(labels: Array) -> tuple[Array, Array]:
    """(R,) the tokens of the flattened (B, N) that have a label, and (R,) the labels."""
    flat = labels.reshape(-1)
    read = (flat != IGNORED_LABEL).nonzero()[0]
    return read, flat[read]


def _predicted(labels: Array, real: Array) -> tuple[Array, Array]:
    """(R,) the tokens of the flattened (B, N) whose successor has a label, and (R,) the labels.

    As `labelled_tokens(predictable_labels(labels, real))`: nothing predicts the label of a token behind padding.
    """
    predicts = np.zeros(labels.shape, bool)
    np.logical_and(labels[:, 1:] != IGNORED_LABEL, real[:, :-1], out=predicts[:, :-1])
    read = predicts.ravel().nonzero()[0]
    return read, labels.reshape(-1)[read + 1]


def _places(read: Array, index: Array, size: int) -> Array:
    """Where tokens (R,) of the flattened (B, N) stand among the real ones at `index` (T,); T for padding.

    Args:
        size: B N.
    """
    if index.size == size:
        return read
    places = np.full(size, index.size)
    places[index] = np.arange(index.size)
    return places[read]


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
        ends = np.minimum(np.arange(1, spare + 1) * longest + count, tokens)
        targets = _next_size(read, self.targets)
        types = packed.token_type_ids
        places = _filled(packed.tokens, targets, tokens)
        if tokens > count:
            # "No token" was T, and is the new T.
            places[places == count] = tokens
        return PackedBatch(
            input_ids=torch.from_numpy(_filled(packed.input_ids, tokens, 0)[None]),
            token_type_ids=None if types is None else torch.from_numpy(_filled(types, tokens, 0)[None]),
            cu_seqlens=torch.from_numpy(np.concatenate((packed.cu_seqlens.numpy(), ends), dtype=np.int32)),
            longest=longest,
            tokens=torch.from_numpy(places),
            targets=torch.from_numpy(_filled(packed.targets, targets, IGNORED_LABEL)),
        )


def _filled(short: Tensor, size: int, value: int) -> Array:
    """(size,) what a tensor (n,) or (1, n) holds, with a value behind it."""
    own = short.numpy().reshape(-1)
    filled = np.full(size, value, own.dtype)
    filled[: own.size] = own
    return filled


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
