"""A padded batch on the host, and what of it is packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptv2_fast.losses import IGNORED_LABEL
from ptv2_fast.step.packed import Buckets, PackedBatch, PackedTask, Sizes

# What a packed batch is made of; anything else in a batch cannot be packed.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")
# The labels of a span, in the order in which they stand beside each other.
SPAN = ("start_positions", "end_positions")
Array = NDArray[Any]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class HostBatch:
    """A padded batch on the host and what of it is packed: whatever sizes it shall have, it is written once.

    Attributes:
        input_ids: (B N,), flattened.
        token_type_ids: (B N,) or None.
        index: (T,) where the real tokens stand in these.
        bounds: (S + 1,) where each row begins among the real tokens.
        longest: no row has more tokens.
        tokens: (K W,) and targets: (K, ...), as those of a `PackedBatch`.
        width, step: as in `Sizes`.
    """

    input_ids: Array
    token_type_ids: Array | None
    index: Array
    bounds: Array
    longest: int
    tokens: Array
    targets: Array
    width: int
    step: str | None

    @property
    def sizes(self) -> Sizes:
        """Those of the batch itself."""
        targets = self.targets
        return Sizes(
            tokens=self.index.size,
            rows=self.bounds.size - 1,
            longest=self.longest,
            examples=targets.shape[0],
            width=self.width,
            target=targets.shape[1:],
            of_numbers=targets.dtype.kind == "f",
            has_types=self.token_type_ids is not None,
            step=self.step,
        )

    def filled(self, buckets: Buckets, limit: int | None) -> Sizes:
        """Those that it is filled up to, for a model whose texts have at most `limit` tokens."""
        return buckets.sizes(self.sizes, limit)

    def write(self, sizes: Sizes, places: Mapping[str, Array]) -> None:
        """Write the batch with rows that nobody reads behind its own.

        Args:
            sizes: what `Buckets.sizes` gives for this batch, or its own.
            places: an array of one dimension for each tensor of a `PackedBatch` of these sizes.
        """
        count, tokens, longest = self.index.size, sizes.tokens, sizes.longest
        _put(places["input_ids"], self.input_ids[self.index], 0)
        if self.token_type_ids is not None:
            _put(places["token_type_ids"], self.token_type_ids[self.index], 0)
        # Tokens of no text are rows too, none longer than the longest one may be.
        ends = places["cu_seqlens"]
        spare = ends.size - self.bounds.size
        ends[: self.bounds.size] = self.bounds
        if spare:
            np.minimum(np.arange(1, spare + 1) * longest + count, tokens, out=ends[-spare:], casting="unsafe")
        self._write_tokens(sizes, places["tokens"])
        _put(places["targets"], self.targets.reshape(-1), IGNORED_LABEL)

    def _write_tokens(self, sizes: Sizes, place: Array) -> None:
        """Write which tokens are read; "no token" was T, and is the new T."""
        count, tokens = self.index.size, sizes.tokens
        if sizes.width == self.width:
            _put(place, self.tokens, tokens)
        else:
            grid, own = place.reshape(sizes.examples, sizes.width), self.tokens.reshape(-1, self.width)
            grid[: own.shape[0], : self.width] = own
            grid[: own.shape[0], self.width :] = tokens + 1
            grid[own.shape[0] :] = tokens
        if tokens > count:
            np.copyto(place, tokens, where=place == count)

    def packed(self, sizes: Sizes | None = None) -> PackedBatch:
        """The batch of these sizes, its own by default, in memory of its own."""
        sizes = self.sizes if sizes is None else sizes
        targets = (sizes.examples, *sizes.target)
        places: dict[str, Array] = {
            "input_ids": np.empty(sizes.tokens, self.input_ids.dtype),
            "cu_seqlens": np.empty(sizes.rows + 1, np.int32),
            "tokens": np.empty(sizes.examples * sizes.width, np.int64),
            "targets": np.empty(int(np.prod(targets)), self.targets.dtype),
        }
        if self.token_type_ids is not None:
            places["token_type_ids"] = np.empty(sizes.tokens, self.token_type_ids.dtype)
        self.write(sizes, places)
        tensors = {name: torch.from_numpy(place) for name, place in places.items()}
        return PackedBatch(
            input_ids=tensors["input_ids"][None],
            token_type_ids=tensors["token_type_ids"][None] if sizes.has_types else None,
            cu_seqlens=tensors["cu_seqlens"],
            longest=sizes.longest,
            tokens=tensors["tokens"],
            targets=tensors["targets"].view(targets),
            width=sizes.width,
            step=sizes.step,
        )


def _put(place: Array, own: Array, filling: int) -> None:
    """Write an array, and a value behind it."""
    place[: own.size] = own
    place[own.size :] = filling


def pack(batch: Mapping[str, Tensor], task: PackedTask, *, whole: bool = False) -> HostBatch:
    """Find what of a padded batch is packed.

    Args:
        batch: input_ids (B, N), or (K, W, N) of a task whose examples are several rows, and labels, with attention_mask
            and token_type_ids where there are any, on the CPU: lengths are read here, on the host.
        task: what a head reads, and what labels are: (K,) classes or (K, ...) numbers of rows, (B, N) of tokens or of a
            text, (B, 2) starts and ends of spans.
        whole: TOKEN_CLS reads every real token and no other, labelled or not.

    Raises:
        ValueError: labels are of another kind or shape; or attention_mask is of another shape.
    """
    examples, width = batch["input_ids"].shape[0], 1
    if task.in_groups:
        width, batch = _flat(batch)
    ids, labels = batch["input_ids"], batch["labels"]
    if reason := why_not_labels(labels, (examples, ids.shape[1]), task):
        raise ValueError(reason)
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have input_ids' shape {tuple(ids.shape)}; got {tuple(mask.shape)}")
    # In numpy: on arrays this small a tensor's operation takes longer to call than to run.
    rows, tokens = ids.shape
    real = np.ones((rows, tokens), bool) if mask is None else _as_bool(mask)
    index = real.ravel().nonzero()[0]
    bounds = index.searchsorted(np.arange(0, rows * tokens + 1, tokens))
    lengths = bounds[1:] - bounds[:-1]
    targets = labels.float().numpy() if task.of_numbers else labels.numpy().astype(np.int64, copy=False)
    step: str | None = "rows"
    if task.gives == "row":
        places = _pooled(ids.numpy(), index, bounds, task)
        step = None if task.whole or task.of_numbers else step
    elif task.gives == "span":
        places, width = _places(np.arange(real.size), index, real.size), tokens
    elif task.gives == "token" and whole:
        places, targets, step = np.arange(index.size), targets.ravel()[index], "targets"
    else:
        read, targets = _labelled(targets) if task.gives == "token" else _predicted(targets, real)
        places, step = _places(read, index, real.size), "targets"
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
        width=width,
        step=step,
    )


def why_not_as_padded(
    packed: HostBatch, batch: Mapping[str, Tensor], task: PackedTask, padding: int | None, unpads: bool
) -> str | None:
    """What the model's own forward would read of a padded batch that is not in the packed one; None for nothing.

    Args:
        batch: what was packed.
        padding: the id by which the base itself finds padding where there is no mask.
        unpads: whether the model's own forward has zeros for the states of padding.
    """
    if padding is not None and batch.get("attention_mask") is None and (packed.input_ids == padding).any():
        return "there is padding and no attention_mask"
    has_padding = packed.index.size < packed.input_ids.size
    if task.gives == "row":
        without = packed.tokens == packed.index.size
        if not without.any():
            return None
        examples = without.reshape(-1, packed.width).any(-1)
        examples = examples if task.of_numbers else examples & (packed.targets != IGNORED_LABEL)
        return "a row with a label has no token to read" if examples.any() else None
    if task.gives == "token" and has_padding:
        is_labelled = batch["labels"].numpy().reshape(-1) != IGNORED_LABEL
        if is_labelled.sum() > is_labelled[packed.index].sum():
            return "there are labels at padding"
    if task.gives == "span":
        places = packed.targets
        if ((places != IGNORED_LABEL) & ((places < 0) | (places >= packed.width))).any():
            return "a span has a place outside the text"
        if has_padding and not unpads:
            return "a span's loss reads padding, which this model computes"
    return None


def with_labels(batch: Mapping[str, Any], task: PackedTask) -> Mapping[str, Any]:
    """A batch whose labels go by that name: starts and ends of spans beside each other (B, 2); zeros where examples
    are compared with each other and there is nothing to say of them."""
    if task.whole:
        if batch.get("input_ids") is None:
            return batch
        return {**batch, "labels": torch.zeros(batch["input_ids"].shape[0], dtype=torch.long)}
    if task.gives != "span":
        return batch
    others = {name: value for name, value in batch.items() if name not in (*SPAN, "labels")}
    return {**others, "labels": spans([batch.get(name) for name in SPAN])}


def spans(sides: list[Any]) -> Tensor | None:
    """(B, 2) starts and ends that are (B,) each; None where they are not two alike."""
    first = sides[0]
    alike = all(
        isinstance(one, Tensor) and (one.shape, one.dtype, one.device) == (first.shape, first.dtype, first.device)
        for one in sides
    )
    return torch.stack(sides, -1) if alike else None


def why_not_labels(labels: Any, shape: tuple[int, int], task: PackedTask) -> str | None:
    """Why labels are not those of a task; None where they are. Looks at no number.

    Args:
        shape: how many examples there are, and the tokens of a row.
    """
    examples, tokens = shape
    if not isinstance(labels, Tensor):
        return f"labels must be a tensor; got {type(labels).__name__}"
    found = f"got {labels.dtype} {tuple(labels.shape)}"
    if not task.of_numbers:
        expected = {"row": (examples,), "span": (examples, 2)}.get(task.gives, (examples, tokens))
        fits = labels.dtype in _INTEGERS and labels.shape == expected
        return None if fits else f"labels must be integers of shape {expected}; {found}"
    fits = labels.dtype in _NUMBERS and labels.dim() in (1, 2) and labels.shape[0] == examples
    return None if fits else f"labels must be float32 or narrower, of shape ({examples},) or ({examples}, C); {found}"


def _flat(batch: Mapping[str, Tensor]) -> tuple[int, Mapping[str, Tensor]]:
    """How many rows an example of a batch (K, W, N) has, and the batch with rows (K W, N)."""
    if batch["input_ids"].dim() != 3:
        raise ValueError(
            f"input_ids must be (K, W, N), the rows of each example; got {tuple(batch['input_ids'].shape)}"
        )
    flat = {name: value.flatten(0, 1) if value.dim() == 3 else value for name, value in batch.items()}
    return batch["input_ids"].shape[1], flat


def _pooled(ids: Array, index: Array, bounds: Array, task: PackedTask) -> Array:
    """(B,) the token of each row that a head reads, among the real ones at `index` (T,); T for none.

    What `pooled_tokens` gives; with a padding_id what transformers' classifiers of decoders read.
    """
    if task.padding_id is not None:
        rows, tokens = ids.shape
        last = (np.arange(tokens) * (ids != task.padding_id)).argmax(-1)
        return _places(np.arange(rows) * tokens + last, index, ids.size)
    ends = bounds[1:] - 1 if task.pooling == "last" else bounds[:-1]
    return np.where(bounds[1:] > bounds[:-1], ends, index.size)


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
