"""Packed rows in few padded batches: each group of rows of about one length is one call of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What a call costs beside its work, forward and backward, in multiply-adds of its scores that take as long; measured on
# a CPU with heads of 16 to 64 numbers.
_CALL = 1 << 18
# The same of an element that is moved to its group's batch and back.
_ELEMENT = 4


@dataclass(frozen=True)
class RowGroup:
    """Some rows, padded at their ends to the longest.

    Attributes:
        rows: their numbers.
        lengths: the tokens of each.
        start: where the group begins among the slots of all groups.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    start: int

    @property
    def longest(self) -> int:
        """N."""
        return max(self.lengths)

    @property
    def end(self) -> int:
        """Where the next group begins."""
        return self.start + len(self.rows) * self.longest

    @property
    def padded(self) -> bool:
        """Whether a row is shorter than the longest."""
        return min(self.lengths) < self.longest

    def attended(self, device: torch.device) -> Tensor | None:
        """(R, N) bool, the tokens that are there; None where all are."""
        if not self.padded:
            return None
        return torch.arange(self.longest, device=device) < torch.tensor(self.lengths, device=device)[:, None]


@dataclass(frozen=True)
class RowGroups:
    """How the T tokens of packed rows fill the slots of all groups' batches.

    Attributes:
        groups: one after the other; a row without tokens is in none.
        tokens: (slots,) the token of each slot, at padding its row's last one: what it holds reaches that row alone.
            None where tokens are slots as they stand.
        slots: (T,) the slot of each token, or None.
    """

    groups: tuple[RowGroup, ...]
    tokens: Tensor | None
    slots: Tensor | None

    @classmethod
    def of(cls, bounds: Sequence[int], width: int, prompt_length: int, device: torch.device) -> RowGroups:
        """Group the rows bounds[i]..bounds[i + 1], for heads of `width` numbers together and P prompt tokens."""
        lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        groups = _chosen(lengths, width, prompt_length)
        rows = [row for group in groups for row in group.rows]
        if rows == sorted(rows) and not any(group.padded for group in groups):
            return cls(groups, None, None)
        tokens, ahead = [], [0] * len(lengths)
        for group in groups:
            for place, row in enumerate(group.rows):
                ahead[row] = group.start + place * group.longest - bounds[row]
            ends = torch.tensor([bounds[row + 1] for row in group.rows])[:, None]
            own = ends - torch.tensor(group.lengths)[:, None] + torch.arange(group.longest)
            tokens.append(own.minimum(ends - 1).flatten())
        slots = torch.arange(bounds[-1]) + torch.tensor(ahead).repeat_interleave(torch.tensor(lengths))
        return cls(groups, torch.cat(tokens).to(device), slots.to(device))

    def spread(self, packed: Tensor) -> list[Tensor]:
        """(T, H, D) -> (R, H, N, D) of each group."""
        slots = packed if self.tokens is None else packed.index_select(0, self.tokens)
        if len(self.groups) == 1:
            parts: Sequence[Tensor] = (slots,)
        else:
            parts = slots.split([group.end - group.start for group in self.groups])
        return [
            part.unflatten(0, (len(group.rows), group.longest)).transpose(1, 2)
            for part, group in zip(parts, self.groups, strict=True)
        ]

    def collect(self, parts: Sequence[Tensor]) -> Tensor:
        """(R, N, ...) of each group -> (T, ...)."""
        flat = [part.flatten(0, 1) for part in parts]
        slots = flat[0] if len(flat) == 1 else torch.cat(flat)
        return slots if self.slots is None else slots.index_select(0, self.slots)


def _chosen(lengths: Sequence[int], width: int, prompt_length: int) -> tuple[RowGroup, ...]:
    """The cheaper of two ways: a group for each run of equal rows, which moves nothing; and fewer groups, of rows that
    cost less to pad than to call for."""

    def work(length: int) -> int:
        return length * (prompt_length + length) * width

    there = [row for row, length in enumerate(lengths) if length]
    runs: list[list[int]] = []
    for row in there:
        if runs and lengths[runs[-1][0]] == lengths[row]:
            runs[-1].append(row)
        else:
            runs.append([row])
    padded: list[list[int]] = []
    wasted = 0
    for row in sorted(there, key=lambda row: -lengths[row]):
        waste = work(lengths[padded[-1][0]]) - work(lengths[row]) if padded else _CALL
        if waste < _CALL:
            padded[-1].append(row)
            wasted += waste
        else:
            padded.append([row])
    moving = _CALL // 2 + _ELEMENT * width * sum(lengths)
    fewer = len(runs) - len(padded)
    chosen = [sorted(rows) for rows in padded] if wasted + moving < fewer * _CALL else runs
    groups: list[RowGroup] = []
    for rows in chosen:
        start = groups[-1].end if groups else 0
        groups.append(RowGroup(tuple(rows), tuple(lengths[row] for row in rows), start))
    return tuple(groups)
