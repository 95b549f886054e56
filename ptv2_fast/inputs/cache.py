"""The key and value cache among a forward's arguments, whose name transformers 5.24 changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
# What the installed transformers calls it, in arguments and in outputs.
CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})


def with_cache_name(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with the cache under the name that the installed transformers has for it.

    Raises:
        ValueError: it is given under both names.
    """
    given = [name for name in CACHE_NAMES if inputs.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{CACHE} must be given once; got {' and '.join(given)}")
    renamed = {name: value for name, value in inputs.items() if name not in CACHE_NAMES}
    return {**renamed, CACHE: inputs[given[0]]} if given else renamed


def cached_tokens(inputs: Mapping[str, Any]) -> int | Tensor:
    """Tokens in the cache; a tensor for a static cache, whose length lives on the device."""
    cache = inputs.get(CACHE)
    return 0 if cache is None else cache.get_seq_length()
