"""Requests of continuous batching, each bound to an adapter from when it is added until its last result is out."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ptv2_fast.adapter import BASE_ROW, Adapter
from ptv2_fast.inputs.max_length import text_limit
from ptv2_fast.inputs.sliding_window import common_window
from ptv2_fast.model import PTuningV2Model
from ptv2_fast.prompts.encoder import PromptEncoder
from ptv2_fast.prompts.kept_bank import versions
from ptv2_fast.prompts.placement import text_offset
from ptv2_fast.task_models.read_requests import Reading

# What transformers puts behind a request's id for those that it forks of it.
CHILD = "__child#"


@dataclass(frozen=True)
class BoundRequest:
    """What a request has from when it is added on.

    Attributes:
        name, adapter: its adapter; None is the bare base.
        offset: how far its text's positions are shifted.
        prompt: what its keys depend on beside its tokens, as it was when the request was added.
        max_new_tokens: how many tokens it may get; None where there is no limit.
        reading: what is read of a request that generates nothing; None of one that does.
    """

    name: str
    adapter: Adapter | None
    offset: int
    prompt: Hashable
    max_new_tokens: int | None
    reading: Reading | None = None

    @classmethod
    def of(
        cls,
        model: PTuningV2Model,
        input_ids: Sequence[int],
        name: str | None,
        max_new_tokens: int | None,
        task: str | None = None,
    ) -> BoundRequest:
        """Bind a request to the adapter of a name, or to the active one; inside `disable_adapter` to none.

        Raises:
            ValueError: there is no such adapter or head, the ids are no text of the model, or it has no place for them.
        """
        if name is None:
            name = BASE_ROW if model._disabled else model.active_adapter
        if name != BASE_ROW:
            model._check_name(name)
        adapter = None if name == BASE_ROW else model.adapters[name]
        size = model.base_model.get_input_embeddings().num_embeddings
        if not len(input_ids) or not 0 <= min(input_ids) <= max(input_ids) < size:
            raise ValueError(f"input_ids must be one or more ids below {size}; got {list(input_ids)[:10]}")
        reading = Reading.of(adapter, name, task)
        if reading is not None:
            max_new_tokens = 1  # which ends it with the last part of its text
        offset = 0 if adapter is None else text_offset(adapter.config, model._family)
        limit = text_limit(model.backbone, model._family)
        if limit is not None:
            # The last token that is generated is read by nobody.
            room = limit - offset - len(input_ids) + 1
            if room < (1 if max_new_tokens is None else max_new_tokens):
                raise ValueError(
                    f"input_ids and max_new_tokens must leave the text within {limit} positions, {offset} of which are "
                    f"the offset of adapter {name!r}; got {len(input_ids)} ids and {max_new_tokens} new tokens"
                )
            max_new_tokens = room if max_new_tokens is None else max_new_tokens
        return cls(name, adapter, offset, _prompt_of(adapter), max_new_tokens, reading)

    @property
    def encoder(self) -> PromptEncoder | None:
        """Its prompts."""
        return None if self.adapter is None else self.adapter.encoder

    @property
    def shared(self) -> Hashable:
        """What requests that share keys with this one have in common with it; None where it shares none: all its text
        is to be read, or somebody has written to its adapter since it was added."""
        return self.prompt if self.reading is None and self.prompt == _prompt_of(self.adapter) else None


# A number for each adapter's prompts, which no later ones get.
_numbers: weakref.WeakKeyDictionary[PromptEncoder, int] = weakref.WeakKeyDictionary()
_next_number = itertools.count()


def _prompt_of(adapter: Adapter | None) -> Hashable:
    """What keys depend on beside tokens, as it is now."""
    if adapter is None:
        return ()
    number = _numbers.get(adapter.encoder)
    if number is None:
        number = _numbers.setdefault(adapter.encoder, next(_next_number))
    return number, versions(adapter.encoder)


class BoundRequests:
    """The requests of a manager that are waiting or running; added by any thread, read by the one that generates."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bound: dict[str, BoundRequest] = {}
        self._left: dict[str, int] = {}  # how many final results are to come, those of forked requests among them

    def add(self, request_id: str, request: BoundRequest, results: int) -> None:
        """Note a request.

        Raises:
            ValueError: another one of that id is waiting or running.
        """
        with self._lock:
            if request_id in self._bound:
                raise ValueError(f"request_id must be of no request that waits or runs; got {request_id!r}")
            self._bound[request_id], self._left[request_id] = request, results

    def __getitem__(self, request_id: str) -> BoundRequest:
        """What a request has, or the one that it was forked of."""
        return self._bound[self._root(request_id)]

    def get(self, request_id: str) -> BoundRequest | None:
        """The same; None where it is known no more."""
        return self._bound.get(self._root(request_id))

    def all(self) -> Collection[BoundRequest]:
        """All of them, as they are now."""
        with self._lock:
            return list(self._bound.values())

    def finished(self, request_id: str, results: int = 1) -> None:
        """Final results are out, or will never be: nothing is kept of a request whose last ones they are."""
        root = self._root(request_id)
        with self._lock:
            if root in self._left:
                self._left[root] -= results
                if self._left[root] <= 0:
                    del self._bound[root], self._left[root]

    def _root(self, request_id: str) -> str:
        return request_id if request_id in self._bound else request_id.rpartition(CHILD)[0] or request_id


def new_tokens(generation_config: Any, max_new_tokens: int | None) -> int | None:
    """How many tokens a request may get: what is said of it, else what the configuration says."""
    most: int | None = generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
    return most


def check_pages(model: PTuningV2Model, config: Any, input_ids: Sequence[int]) -> None:
    """Refuse a text that no step could write into the pages, which would end them all.

    Raises:
        ValueError: what layers keep of it is more than all blocks together, where their number is known.
    """
    kept = min(len(input_ids), common_window(model.backbone) or len(input_ids))
    if config.num_blocks and kept > config.num_blocks * config.page_size:
        raise ValueError(
            f"input_ids must fit into {config.num_blocks} blocks of {config.page_size} tokens; got {len(input_ids)}"
        )


def check_sequences(count: int, request: BoundRequest, input_ids: Sequence[int]) -> None:
    """Refuse several sequences of a request that generates none, or that transformers could not fork.

    Raises:
        ValueError: a head, or nobody, reads its text; or that is a single id, which is not read before the fork: a step
            without any token would end them all.
    """
    if count > 1 and request.reading is not None:
        raise ValueError(
            f"num_return_sequences must be 1 in the generation configuration where an adapter generates nothing; got "
            f"{count} for {request.name!r}"
        )
    if count > 1 and len(input_ids) < 2:
        raise ValueError(f"input_ids must be two or more where num_return_sequences is {count}; got {list(input_ids)}")


def names_of_requests(adapter_names: Sequence[str | None] | None, count: int) -> list[str | None]:
    """The adapter that is named for each request.

    Raises:
        ValueError: there is not one name for each.
    """
    if adapter_names is None:
        return [None] * count
    if isinstance(adapter_names, str) or len(adapter_names) != count:
        raise ValueError(f"adapter_names must be one name for each of {count} inputs; got {adapter_names!r}")
    return list(adapter_names)
