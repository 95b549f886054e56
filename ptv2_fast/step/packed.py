"""A batch of training rows as packed tokens with the targets of its loss, in sizes that repeat."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ptv2_fast.losses import IGNORED_LABEL
from ptv2_fast.task_types import SINGLE_LABEL, TASKS

_TENSORS = ("input_ids", "token_type_ids", "cu_seqlens", "tokens", "targets")


@dataclass(frozen=True)
class PackedTask:
    """What decides how batches are packed.

    Attributes:
        task_type: whose labels there are.
        pooling: which states a head over rows reads: of the "first" or the "last" token, or the "mean" of all.
        problem_type: what such a head solves.
        padding_id: the last token is the last one of another id, whatever the mask says; None: the last real one.
        whole: every row counts in the loss, labelled or not: none may be added.
    """

    task_type: str
    pooling: str = "first"
    problem_type: str = SINGLE_LABEL
    padding_id: int | None = None
    whole: bool = False

    # Asked several times in every step.
    @cached_property
    def gives(self) -> str:
        """As `TaskType.gives`."""
        return TASKS[self.task_type].gives

    @cached_property
    def is_padded(self) -> bool:
        """Whether rows stay padded, as those of encoder-decoders."""
        return self.task_type == "SEQ_2_SEQ_LM"

    @cached_property
    def in_groups(self) -> bool:
        """As `TaskType.in_groups`."""
        return TASKS[self.task_type].in_groups

    @cached_property
    def of_numbers(self) -> bool:
        """Whether labels are numbers, not classes or places."""
        return self.gives == "row" and self.problem_type != SINGLE_LABEL


class Sizes(NamedTuple):
    """What decides which kernels a packed batch runs: two batches of the same sizes run the same ones.

    Attributes:
        tokens, rows, longest: T, S and the most tokens of a row.
        examples: K, how many targets there are.
        width: W, of how many tokens each target's states are.
        target: the shape of one target.
        of_numbers: targets are float32, not int64.
        has_types: there are token types.
        step: by which of `Buckets`' steps K is filled up; None for none, where every target counts in the loss.
    """

    tokens: int
    rows: int
    longest: int
    examples: int
    width: int
    target: tuple[int, ...]
    of_numbers: bool
    has_types: bool
    step: str | None

    @property
    def of_slots(self) -> bool:
        """Whether an example's tokens are the slots of its padded row, whose number may be filled up too."""
        return self.target == (2,) and not self.of_numbers


@dataclass(frozen=True)
class PackedBatch:
    """Rows of text without padding, one after the other, and what their loss compares.

    Attributes:
        input_ids: (1, T).
        token_type_ids: (1, T) or None.
        cu_seqlens: (S + 1,) int32: where each row begins; rows may be empty.
        longest: no row has more tokens.
        tokens: (K W,) the tokens of T whose last states are read; T stands for none, whose state is zero, and T + 1 for
            a slot that the padded batch does not have.
        targets: (K, ...) their labels, -100 where there is none: (K,) classes, (K, 2) a span's start and end, (K,) or
            (K, C) numbers.
        width: W.
        step: as in `Sizes`.
    """

    input_ids: Tensor
    token_type_ids: Tensor | None
    cu_seqlens: Tensor
    longest: int
    tokens: Tensor
    targets: Tensor
    width: int = 1
    step: str | None = "targets"

    @property
    def sizes(self) -> Sizes:
        """Two batches of the same sizes run the same kernels."""
        return Sizes(
            tokens=self.input_ids.shape[1],
            rows=self.cu_seqlens.shape[0] - 1,
            longest=self.longest,
            examples=self.targets.shape[0],
            width=self.width,
            target=tuple(self.targets.shape[1:]),
            of_numbers=self.targets.is_floating_point(),
            has_types=self.token_type_ids is not None,
            step=self.step,
        )

    def to(self, device: torch.device) -> PackedBatch:
        """On another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}


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
    """(1, T) the targets (R,) beside their tokens, -100 elsewhere."""
    tokens = packed.input_ids.shape[1]
    labels = packed.targets.new_full((tokens + 1,), IGNORED_LABEL)
    return labels.index_copy(0, packed.tokens, packed.targets)[None, :tokens]


class StepBatch(Protocol):
    """A batch as passes compute it, packed or padded."""

    @property
    def sizes(self) -> Hashable:
        """Two batches of the same sizes run the same kernels."""

    @property
    def input_ids(self) -> Tensor:
        """The text."""

    def to(self, device: torch.device) -> Any:
        """On another device."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""


class OnHost(Protocol):
    """A batch on the host that takes any sizes of at least its own."""

    @property
    def sizes(self) -> Any:
        """Its own."""

    def filled(self, buckets: Buckets, limit: int | None) -> Any:
        """Those that it is filled up to."""

    def write(self, sizes: Any, places: Mapping[str, Any]) -> None:
        """Write the batch of these sizes into an array of one dimension for each of its tensors."""

    def packed(self, sizes: Any = None) -> Any:
        """The batch of these sizes."""


@dataclass(frozen=True)
class Buckets:
    """To which sizes packed batches are filled up, so that few different ones occur.

    Small counts become multiples of the numbers here, larger ones of ever larger powers of two: at most about an
    eighth is filling, and from each power of two to the next there are eight sizes. The longest row is taken as the
    next power of two.

    Attributes:
        tokens: the smallest step of tokens.
        rows: of rows.
        targets: of tokens that have labels.
        slots: of the tokens of padded rows, where nothing is packed.

    Raises:
        ValueError: a step is not a positive integer.

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertModel

        from ptv2_fast import Buckets, GraphRunner, PTuningV2Config, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", heads={"topic": 3})).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        runner = GraphRunner(model, optimizer, buckets=Buckets(tokens=256, rows=32))  # fewer sizes, more filling
        ```
    """

    tokens: int = 64
    rows: int = 8
    targets: int = 32
    slots: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name} must be a positive integer; got {value!r}")

    def sizes(self, own: Sizes, limit: int | None = None) -> Sizes:
        """Those that a batch is filled up to.

        Args:
            own: the batch's.
            limit: the longest text that the model takes.
        """
        longest = _power_of_two(own.longest)
        longest = longest if limit is None else max(min(longest, limit), own.longest)
        tokens = _next_size(own.tokens, self.tokens)
        # Rows for the tokens of no text. How many there are may depend on the sizes alone.
        spare = -(-_step(tokens, self.tokens) // longest)
        rows = _next_size(own.rows, self.rows) + spare
        examples = own.examples if own.step is None else _next_size(own.examples, getattr(self, own.step))
        width = _power_of_two(own.width) if own.of_slots else own.width
        return Sizes(tokens, rows, longest, examples, width, *own[5:])

    def slots_of(self, count: int, limit: int | None = None) -> int:
        """The number of slots that so many are filled up to; `limit` is the most that the model takes."""
        filled = _next_size(count, self.slots)
        return filled if limit is None else max(min(filled, limit), count)

    def fill(self, batch: OnHost, limit: int | None = None) -> Any:
        """The batch of its next sizes."""
        return batch.packed(batch.filled(self, limit))


def _power_of_two(count: int) -> int:
    """The next one, and 16 at least."""
    return max(16, 1 << (count - 1).bit_length())


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
