"""Blocks of transformers' pages that requests share: those of one adapter with one another, and with nobody else."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class SharedBlocks:
    """Lets a cache know blocks by their tokens and by what else their keys depend on.

    transformers knows a block by a hash of its tokens, which follows from that of the block before it. Where a text's
    first token is a number of that token and of the request's adapter, two adapters have no block in common.
    """

    def __init__(self, adapter_of: Callable[[str], Hashable]) -> None:
        """Args: adapter_of: what a request's keys depend on beside its tokens, by the request's id."""
        self._adapter_of = adapter_of
        self._numbers: dict[tuple[Hashable, int], int] = {}

    def install(self, cache: Any) -> None:
        """Make a `PagedAttentionCache` of one manager share its blocks so; nobody else's is touched."""
        search = cache.search_prefix_match
        cache.search_prefix_match = lambda request_id, ids: search(request_id, self._numbered(request_id, ids))
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = self._marking(allocator.mark_complete_blocks)

    def _marking(self, mark: Callable[..., None]) -> Callable[[str, list[int], int], None]:
        return lambda request_id, ids, count: mark(request_id, self._numbered(request_id, ids), count)

    def _numbered(self, request_id: str, ids: list[int]) -> list[int]:
        """A text's ids with a number in the place of the first one: negative, which no id is."""
        first = (self._adapter_of(request_id), ids[0])
        return [self._numbers.setdefault(first, -1 - len(self._numbers)), *ids[1:]]
