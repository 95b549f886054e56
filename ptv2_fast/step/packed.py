"""A padded batch of training rows as packed tokens with the targets of its loss, in sizes that repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptv2_fast.losses import IGNORED_LABEL
from ptv2_fast.task_types import TASKS

# What a packed batch is made of; anything else in a batch cannot be packed.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")
_TENSORS = ("input_ids", "token_type_ids", "cu_seqlens", "tokens", "targets")
Array = NDArray[Any]
# T, S, longest, R, and whether there are token types.
Sizes = tuple[int, int, int, int, bool]


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
    def sizes(self) -> Sizes:
        """Two batches of the same sizes run the same kernels."""
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


@dataclass
class HostBatch:
    """A padded batch on the host and what of it is packed: whatever sizes it shall have, it is written once.

    Attributes:
        input_ids: (B N,), flattened.
        token_type_ids: (B N,) or None.
        index: (T,) where the real tokens stand in these.
        bounds: (S + 1,) where each row begins among the real tokens.
        longest: no row has more tokens.
        tokens, targets: (R,) as those of a `PackedBatch`.
    """

    input_ids: Array
    token_type_ids: Array | None
    index: Array
    bounds: Array
    longest: int
    tokens: Array
    targets: Array

    @property
    def sizes(self) -> Sizes:
        """Those of the batch itself."""
        return self.index.size, self.bounds.size - 1, self.longest, self.targets.size, self.token_type_ids is not None

    def write(self, sizes: Sizes, places: Mapping[str, Array]) -> None:
        """Write the batch with rows that nobody reads behind its own.

        Args:
            sizes: what `Buckets.sizes` gives for this batch, or its own.
            places: an array of one dimension for each tensor of a `PackedBatch` of these sizes.
        """
        count, tokens, longest = self.index.size, sizes[0], sizes[2]
        _put(places["input_ids"], self.input_ids[self.index], 0)
        if self.token_type_ids is not None:
            _put(places["token_type_ids"], self.token_type_ids[self.index], 0)
        # Tokens of no text are rows too, none longer than the longest one may be.
        ends = places["cu_seqlens"]
        spare = ends.size - self.bounds.size
        ends[: self.bounds.size] = self.bounds
        if spare:
            np.minimum(np.arange(1, spare + 1) * longest + count, tokens, out=ends[-spare:], casting="unsafe")
        _put(places["tokens"], self.tokens, tokens)
        if tokens > count:
            # "No token" was T, and is the new T.
            np.copyto(places["tokens"], tokens, where=places["tokens"] == count)
        _put(places["targets"], self.targets, IGNORED_LABEL)

    def packed(self, sizes: Sizes | None = None) -> PackedBatch:
        """The batch of these sizes, its own by default, in memory of its own."""
        tokens, rows, longest, read, has_types = sizes = self.sizes if sizes is None else sizes
        places: dict[str, Array] = {
            "input_ids": np.empty(tokens, self.input_ids.dtype),
            "cu_seqlens": np.empty(rows + 1, np.int32),
            "tokens": np.empty(read, np.int64),
            "targets": np.empty(read, np.int64),
        }
        if self.token_type_ids is not None:
            places["token_type_ids"] = np.empty(tokens, self.token_type_ids.dtype)
        self.write(sizes, places)
        tensors = {name: torch.from_numpy(place) for name, place in places.items()}
        return PackedBatch(
            input_ids=tensors["input_ids"][None],
            token_type_ids=tensors["token_type_ids"][None] if has_types else None,
            cu_seqlens=tensors["cu_seqlens"],
            longest=longest,
            tokens=tensors["tokens"],
            targets=tensors["targets"],
        )


def _put(place: Array, own: Array, filling: int) -> None:
    """Write an array, and a value behind it."""
    place[: own.size] = own
    place[own.size :] = filling


def pack(batch: Mapping[str, Tensor], task_type: str, pooling: str = "first", *, whole: bool = False) -> HostBatch:
    """Find what of a padded batch is packed.

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
    gives = TASKS[task_type].gives
    shape = ids.shape[:1] if gives == "row" else ids.shape
    if labels.is_floating_point() or labels.shape != shape:
        raise ValueError(f"labels must be integers of shape {tuple(shape)}; got {labels.dtype} {tuple(labels.shape)}")
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have input_ids' shape {tuple(ids.shape)}; got {tuple(mask.shape)}")
    # In numpy: on arrays this small a tensor's operation takes longer to call than to run.
    rows, tokens = ids.shape
    real = np.ones((rows, tokens), bool) if mask is None else _as_bool(mask)
    index = real.ravel().nonzero()[0]
    bounds = index.searchsorted(np.arange(0, rows * tokens + 1, tokens))
    lengths = bounds[1:] - bounds[:-1]
    targets = labels.numpy().astype(np.int64, copy=False)
    if gives == "row":
        # What `pooled_tokens` gives, among the real tokens.
        places = np.where(lengths > 0, bounds[:-1] if pooling == "first" else bounds[1:] - 1, index.size)
    elif gives == "token" and whole:
        places, targets = np.arange(index.size), targets.ravel()[index]
    else:
        read, targets = _labelled(targets) if gives == "token" else _predicted(targets, real)
        places = _places(read, index, real.size)
    types = batch.get("token_type_ids")
    if types is not None and types.shape[0] != rows:
        types = types.expand(rows, -1)
    return HostBatch(
        input_ids=ids.numpy().reshape(-1),
        token_type_ids=None if types is None else types.numpy().reshape(-1),
        index=index,
        bounds=bounds,
        longest=int(lengths.max(initial=1)),
        tokens=places,
        targets=targets,
    )


def _as_bool(mask: Tensor) -> Array:
    """What is not zero; numpy does not know every kind of fraction."""
    whole = mask.bool() if mask.is_floating_point() else mask
    return whole.numpy().astype(bool, copy=False)


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

    def sizes(self, batch: HostBatch, limit: int | None = None) -> Sizes:
        """Those that a batch is filled up to.

        Args:
            limit: the longest text that the model takes.
        """
        count, rows, own, read, has_types = batch.sizes
        longest = max(16, 1 << (own - 1).bit_length())
        longest = longest if limit is None else max(min(longest, limit), own)
        tokens = _next_size(count, self.tokens)
        # Rows for the tokens of no text. How many there are may depend on the sizes alone.
        spare = -(-_step(tokens, self.tokens) // longest)
        return tokens, _next_size(rows, self.rows) + spare, longest, _next_size(read, self.targets), has_types

    def fill(self, batch: HostBatch, limit: int | None = None) -> PackedBatch:
        """The batch of its next sizes."""
        return batch.packed(self.sizes(batch, limit))


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
