"""The adapters of a call's rows, and what makes their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ptv2_fast.adapter import Adapter
from ptv2_fast.attention.prompt_batch import Account, PromptBatch
from ptv2_fast.frozen_base import FrozenBase
from ptv2_fast.inputs.text import PackedRows
from ptv2_fast.prompts.cache import PromptCache, Prompts
from ptv2_fast.prompts.placement import text_offset
from ptv2_fast.prompts.source import PromptSource


@dataclass(frozen=True)
class RowPrompts:
    """The prompts that a call's rows ask for; they are made when they are needed, after the call has been checked.

    Attributes:
        names: the adapter of every row, or a single name where all rows have the same.
        adapters: the same as adapters; None is the bare base.
        backend: which backend of `prompt_attention` serves them.
        sources: what makes the prompt of the one adapter, or each entry of the bank of several; None is the bare base.
        entries: which of them each row uses; None where all rows share one prompt.
        kept: what was made of them before, as long as they are frozen.
        named: how many rows the caller named adapters of; 1 where it named none.
    """

    names: Sequence[str]
    adapters: Sequence[Adapter | None]
    backend: str
    sources: Sequence[PromptSource | None]
    entries: Sequence[int] | None
    kept: PromptCache
    named: int = 1

    def batch(self, base: FrozenBase, device: torch.device, packing: PackedRows | None = None) -> PromptBatch:
        """The prompts of a forward pass, and the boundaries of its rows where it is packed."""
        layers: Prompts = (None,) * base.sizes.num_layers
        if self.sources[0] is not None or len(self.sources) > 1:
            layers = self.kept.of(self.sources, self.backend)
        index = None if self.entries is None else torch.tensor(self.entries, device=device)
        if packing is None:
            return PromptBatch(layers, index, backend=self.backend, asked=new_account())
        index = None if index is None else index[packing.row_of]
        return PromptBatch(layers, index, packing.cu_seqlens, packing.longest, self.backend, asked=new_account())

    def offsets(self, base: FrozenBase) -> list[int]:
        """How far the text of each row is moved; a single one where all rows have the same adapter."""
        return [0 if one is None else text_offset(one.config, base.family) for one in self.adapters]


@dataclass(frozen=True)
class ReadyPrompts:
    """Prompts that are made already, beside a text whose positions have been moved for them.

    Attributes:
        prompts: those of all rows.
    """

    prompts: PromptBatch

    def batch(self, base: FrozenBase, device: torch.device, packing: PackedRows | None = None) -> PromptBatch:
        """The prompts of a forward pass over padded rows."""
        return replace(self.prompts, asked=new_account())

    def offsets(self, base: FrozenBase) -> list[int]:
        """None is left."""
        return [0]


def new_account() -> Account | None:
    """What every forward is checked by; the compiler cannot trace it, and what it traces is the view's own code."""
    return None if torch.compiler.is_compiling() else Account()
