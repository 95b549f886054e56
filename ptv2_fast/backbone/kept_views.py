"""Views that are made once and kept: for as long as nothing that they were copied from has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any, TypeVar

import torch
from torch import nn

from ptv2_fast.backbone.view import LOOKS_AT, SOURCE, Source

M = TypeVar("M", bound=nn.Module)


class KeptViews:
    """The last view that somebody made, in each thread.

    Nothing is kept of what a view stands for but what can be seen to be the same: attributes, children, classes and
    configurations of the modules behind it are compared, by identity, each time that it is asked for. Threads have
    views of their own, so that no call meets another one's module. Inside torch.compile nothing is kept.
    """

    def __init__(self) -> None:
        self._own = threading.local()

    def __reduce__(self) -> tuple[type[KeptViews], tuple[()]]:
        """A copy keeps nothing."""
        return KeptViews, ()

    def of(self, made_of: Sequence[object], make: Callable[[], M]) -> M:
        """What `make` gave for these very objects the last time, or what it gives now.

        Args:
            made_of: everything that `make` looks at; of views among them it is known that they are still right.
            make: gives a view of modules among them.
        """
        if torch.compiler.is_compiling():
            return make()
        kept: _Kept | None = getattr(self._own, "kept", None)
        if kept is None or not kept.is_of(made_of):
            self._own.kept = None
            self._own.kept = kept = _Kept(made_of, make())
        view: M = kept.view
        return view


class _Kept:
    """A view, and what the modules behind it were when it was made."""

    def __init__(self, made_of: Sequence[object], view: nn.Module) -> None:
        self.view: Any = view
        self._made_of = tuple(made_of)
        behind = _sources(one for one in self._made_of if isinstance(one, nn.Module))
        sources = [source for key, source in _sources([view]).items() if key not in behind]
        self._modules = [source.module for source in sources]
        self._kinds = [source.kind for source in sources]
        seen = {id(own): (own, items) for source in sources for own, items in source.seen}
        self._dicts = [own for own, _ in seen.values()]
        self._keys = [key for _, items in seen.values() for key, _ in items]
        self._values = [value for _, items in seen.values() for _, value in items]

    def is_of(self, made_of: Sequence[object]) -> bool:
        """Whether the view is of these objects, and they are as they were.

        Every step looks at each attribute of each layer, so this is one pass that no line of Python interrupts.
        """
        return (
            len(made_of) == len(self._made_of)
            and all(map(is_, made_of, self._made_of))
            and sum(map(len, self._dicts)) == len(self._values)
            and all(map(is_, chain.from_iterable(map(dict.values, self._dicts)), self._values))
            and all(map(is_, chain.from_iterable(self._dicts), self._keys))
            and all(map(is_, map(type, self._modules), self._kinds))
        )


def _sources(modules: Iterable[nn.Module]) -> dict[int, Source]:
    """Everything that views were copied from and that is no view itself, by the module's identity."""
    found: dict[int, Source] = {}
    seen: set[int] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        source: Source | None = module.__dict__.get(SOURCE)
        if id(module) in seen or source is None:
            continue
        seen.add(id(module))
        if SOURCE not in source.module.__dict__:
            found[id(source.module)] = source
        waiting.append(source.module)
        waiting += [child for child in module._modules.values() if child is not None]
        if LOOKS_AT in module.__dict__:
            waiting.append(module.__dict__[LOOKS_AT][0])
    return found
