"""What the functions of a task are given: how examples meet a tokenizer, and a trained adapter; each without its task.

`task_data.TaskCodec` and `loading.LoadedAdapter` are these; they know their task's functions, which therefore do not
know them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ptv2_fast.training.labels import LabelSet

if TYPE_CHECKING:  # it needs torch
    from ptv2_fast.training.batches import PadCollator


class Codec(Protocol):
    """How the examples of one task meet one tokenizer; see `task_data.TaskCodec`."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def labels(self) -> LabelSet | None: ...

    @property
    def max_length(self) -> int: ...

    @property
    def doc_stride(self) -> int: ...

    @property
    def no_answer(self) -> bool: ...

    @property
    def known_labels(self) -> LabelSet: ...

    @property
    def collator(self) -> PadCollator: ...

    def encode(self, examples: Sequence[Mapping[str, Any]], *, quiet: bool = False) -> list[dict[str, Any]]: ...


class Loaded(Protocol):
    """A trained adapter on its base; see `loading.LoadedAdapter`."""

    @property
    def model(self) -> Any: ...

    @property
    def codec(self) -> Codec: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...
