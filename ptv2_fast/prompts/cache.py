"""Keys and values that stay from call to call: while somebody has said that nothing they are made of changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ptv2_fast.attention.autocast import autocast_dtype
from ptv2_fast.attention.prompt_batch import LayerPrompt, LazyPrompt
from ptv2_fast.prompts.source import PromptSource

Prompts = tuple[LayerPrompt | LazyPrompt | None, ...]


class PromptCache:
    """What one model's adapters made while their prompts were frozen; nothing at any other time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scopes = 0
        # None where no scope is open. Who began before the last scope closed writes to a dictionary that nobody reads.
        self._made: dict[tuple, Prompts] | None = None
        self._also_training = False

    @classmethod
    def for_one_call(cls) -> PromptCache:
        """Frozen from the start and for good, whatever the mode: for who runs many forwards in one call."""
        kept = cls()
        kept._scopes, kept._made, kept._also_training = 1, {}, True
        return kept

    def __reduce__(self) -> tuple[type[PromptCache], tuple[()]]:
        """A copy has no scope open."""
        return PromptCache, ()

    @property
    def is_open(self) -> bool:
        """Whether prompts are frozen now."""
        return self._made is not None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """A scope in which prompts are frozen, for every thread; what was kept goes when the last one closes."""
        with self._lock:
            self._scopes += 1
            if self._made is None:
                self._made = {}
        try:
            yield
        finally:
            with self._lock:
                self._scopes -= 1
                if not self._scopes:
                    self._made = None

    def of(self, sources: Sequence[PromptSource | None], backend: str) -> Prompts:
        """The prompts of one adapter, or the bank of several: made for this call, unless they are frozen.

        Prompts that train, that the compiler makes or that wait for a layer's weights are made for every call.
        """
        kept = self._made
        if kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return made(sources, backend)
        trains = any(source is not None and source.trains for source in sources)
        if trains and not self._also_training:
            return made(sources, backend)
        key = (*sources, backend, *_surroundings(*next(s for s in sources if s is not None).place))
        if key not in kept:
            new = made(sources, backend)
            if any(isinstance(prompt, LazyPrompt) for prompt in new):
                return new
            # Of two threads that made the same at once, both go on with what the first one kept.
            return kept.setdefault(key, new)
        return kept[key]


def made(sources: Sequence[PromptSource | None], backend: str) -> Prompts:
    """The prompts of one adapter, or the bank of several, made now; None stands for an entry without any."""
    if len(sources) == 1 and sources[0] is not None:
        return sources[0](backend)
    return PromptSource.bank(sources, backend)


def _surroundings(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """What the same weights are made into something else by, or by somebody else who need not wait for it."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return autocast_dtype(device), torch.is_inference_mode_enabled(), device, dtype, stream
