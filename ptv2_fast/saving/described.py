"""What is written of a model: as much as hub and exports have to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from ptv2_fast.adapter import Adapter
from ptv2_fast.typed_modules import ModuleDictOf


class Described(Protocol):
    """A model with adapters that can be described and saved.

    Attributes:
        base_model: the frozen base.
        adapters: the adapters by name.
    """

    base_model: PreTrainedModel
    adapters: ModuleDictOf[Adapter]

    def save_pretrained(self, save_directory: str | Path, *, adapter_names: Sequence[str] | None = None) -> None:
        """Write adapters into a folder; None means all."""
