"""Blocks of transformers' pages that requests share: those of one adapter with one another, and with nobody else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Any

# So many first tokens of adapters are known at once.
_KNOWN = 2**16


class SharedBlocks:
    """Lets a cache know blocks by their tokens and by what else their keys depend on.

    transformers knows a block by a hash of its tokens, which follows from that of the block before it. Where a text's
    first token is a number of that token and of the request's adapter, two adapters have no block in common.
    """

    def __init__(self, adapter_of: Callable[[str], Hashable]) -> None:
        """Args: adapter_of: what a request's keys depend on beside its tokens, by its id; None where it shares none."""
        self._adapter_of = adapter_of
        self._numbers: dict[tuple[Hashable, int], int] = {}
        self._next_number = itertools.count(1)

    def install(self, cache: Any) -> None:
        """Make a `PagedAttentionCache` of one manager share its blocks so; nobody else's is touched."""
        search = cache.search_prefix_match

        def found(request_id: str, ids: list[int]) -> int:
            numbered = self._numbered(request_id, ids)
            return 0 if numbered is None else search(request_id, numbered)

        cache.search_prefix_match = found
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = self._marking(allocator.mark_complete_blocks)

    def _marking(self, mark: Callable[..., None]) -> Callable[[str, list[int], int], None]:
        def marked(request_id: str, ids: list[int], count: int) -> None:
            numbered = self._numbered(request_id, ids)
            if numbered is not None:
                mark(request_id, numbered, count)

        return marked

    def _numbered(self, request_id: str, ids: list[int]) -> list[int] | None:
        """A text's ids with a number in the place of the first one, negative, which no id is; None where it shares
        none."""
        adapter = self._adapter_of(request_id)
        if adapter is None:
            return None
        number = self._numbers.get((adapter, ids[0]))
        if number is None:
            if len(self._numbers) == _KNOWN:
                self._numbers.clear()  # numbers do not come again: what they stood for is read anew
            number = self._numbers[adapter, ids[0]] = -next(self._next_number)
        return [number, *ids[1:]]
