"""Captured steps without CUDA: a stand-in for capture, so that what only a card reaches is run before there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptv2_fast.step.capture import CAPTURES


@dataclass
class Counts:
    """What the stand-ins of a context have done.

    Attributes:
        warm_ups: calls run as they will be captured.
        captures: calls captured.
        replays: replays of those.
    """

    warm_ups: int = 0
    captures: int = 0
    replays: int = 0


class StandIn:
    """Keeps a call where CUDA records its kernels: a replay runs it again, on what its buffers hold by then.

    As on CUDA nothing runs at a capture, every replay gives the same tensor, and the memory that it writes to is that
    of the first one: a replay that writes elsewhere raises. What a call reads from Python is not kept, as it would be
    by CUDA.
    """

    # Optimizers refuse to be capturable on a CPU, where the call is run in full anyhow.
    capturable = False

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        """Run a call."""
        self.counts.warm_ups += 1
        return call()

    def __call__(self, call: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
        """Keep a call; what comes back runs it."""
        self.counts.captures += 1
        kept: list = []

        def replay() -> Tensor | None:
            self.counts.replays += 1
            with _Writes() as writes:
                result = call()
            if not kept:
                kept.extend((result, writes.outside))
            first, places = kept
            if writes.outside != places:
                raise RuntimeError("a replay writes to other memory than the first one: a captured graph would not")
            if first is not None and result is not first:
                first.copy_(result)
            return first

        return replay


@contextmanager
def captured_on_cpu(stand_in: Callable[[Counts], StandIn] = StandIn) -> Iterator[Counts]:
    """Within this context a `GraphRunner` on the CPU takes the path that it takes on CUDA.

    Args:
        stand_in: what captures.

    Returns:
        what has been captured and replayed since.
    """
    counts = Counts()
    before = CAPTURES.get("cpu")
    CAPTURES["cpu"] = lambda device: stand_in(counts)
    try:
        yield counts
    finally:
        if before is None:
            del CAPTURES["cpu"]
        else:
            CAPTURES["cpu"] = before


class _Writes(TorchDispatchMode):
    """Notes which memory, of that which was there before, is written to.

    Attributes:
        outside: addresses of the storages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outside: set[int] = set()
        self._made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = set(_addresses((args, kwargs)))
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                self.outside.update(set(_addresses(value)) - self._made)
        result = func(*args, **kwargs)
        self._made.update(set(_addresses(result)) - given)
        return result


def _addresses(values: object) -> list[int]:
    return [leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
