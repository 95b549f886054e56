"""Model types that are refused by name, and why: those whose code leaves no way to the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# `config.model_type` -> the reason. Where transformers gives such a model its attention interface, and it then behaves
# like a listed family, it is taken for one.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "bloom": "BLOOM's attention is code of its own, which adds a term for each key's slot (ALiBi) and keeps a "
        "cache, and does not run through transformers' attention interface",
        "falcon": "Falcon's attention is code of its own, with multi-query heads, ALiBi in some models and a cache, "
        "and does not run through transformers' attention interface",
    }
)
