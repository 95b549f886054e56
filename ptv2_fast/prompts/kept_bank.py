"""Keys and values that stay from step to step while requests come and go: each adapter's made once, in one bank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ptv2_fast.prompts.bank import stack_bank
from ptv2_fast.prompts.cache import Prompts
from ptv2_fast.prompts.encoder import PromptEncoder
from ptv2_fast.prompts.source import PromptSource

Member = PromptEncoder | None  # None is a row without a prompt


class KeptBank:
    """The prompts of many steps' rows, for one thread.

    An adapter's keys and values are made when a row first has it, and again once somebody has written to its
    parameters (optimizers, load_state_dict and in-place operations are seen; writes through `.data` are not). They are
    there for as long as the adapter is. A bank of all adapters that are in use is put together when a row's is not in
    the last one.
    """

    def __init__(self, source_of: Callable[[PromptEncoder], PromptSource], num_layers: int) -> None:
        self._source_of = source_of
        self._nothing: Prompts = (None,) * num_layers
        self._made: WeakKeyDictionary[PromptEncoder, tuple[tuple[object, ...], Prompts]] = WeakKeyDictionary()
        self._banked: dict[Member, Prompts] = {}  # in the order of the bank's entries
        self._bank: Prompts = self._nothing
        self._longest = 0

    def of(self, rows: Sequence[Member], in_use: Collection[Member], backend: str) -> tuple[Prompts, list[int] | None]:
        """Every layer's prompt for rows that all have the same, and None; else a bank, and the entry of each row.

        Args:
            rows: the prompts of each row.
            in_use: those of all rows that are waiting or running.
            backend: which backend of `prompt_attention` serves them.
        """
        wanted = {row: self._prompts(row, backend) for row in dict.fromkeys(rows)}
        if len(wanted) == 1:
            return next(iter(wanted.values())), None
        # A prompt that is longer than all that are in use would be read with each of them.
        banked = all(self._banked.get(row) is prompts for row, prompts in wanted.items())
        if not banked or self._longest > max(map(_length, in_use)):
            self._gather({**dict.fromkeys(in_use), **wanted}, backend)
        places = {row: place for place, row in enumerate(self._banked)}
        return self._bank, [places[row] for row in rows]

    def _prompts(self, encoder: Member, backend: str) -> Prompts:
        """An adapter's keys and values, as its parameters are now."""
        if encoder is None:
            return self._nothing
        state = (backend, *versions(encoder))
        known = self._made.get(encoder)
        if known is None or known[0] != state:
            known = self._made[encoder] = state, self._source_of(encoder)(backend)
        return known[1]

    def _gather(self, members: Collection[Member], backend: str) -> None:
        self._banked = {one: self._prompts(one, backend) for one in members}
        self._bank = stack_bank(list(self._banked.values()))
        self._longest = max(map(_length, self._banked))


def _length(member: Member) -> int:
    return 0 if member is None else member.shape[-2]


# A number for each parameter, which no later ones get: Python gives an object the id of one that is gone.
_numbers = WeakTensorKeyDictionary()
_next_number = itertools.count()


def versions(encoder: PromptEncoder) -> tuple[tuple[int, int | None], ...]:
    """What is another once somebody has written to one of the parameters, or put others in their place."""
    return tuple((_number_of(one), None if one.is_inference() else one._version) for one in encoder.parameters())


def _number_of(parameter: nn.Parameter) -> int:
    number: int | None = _numbers.get(parameter)
    if number is None:
        number = _numbers.setdefault(parameter, next(_next_number))
    return number
