"""Batches of random token ids with labels, and the prompts that every provider starts from."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.step.models import FIRST_WORD, sizes_of

# Prompts large enough to change what a random model computes: a provider that drops them is found out.
_DEEP_STD, _PREFIX_STD = 1.0, 0.5


@dataclass(frozen=True)
class Batch:
    """One padded batch.

    Attributes:
        input_ids, attention_mask: (B, N) int64, padding on the right.
        labels: (B,) classes for an encoder; (B, N) for a causal model, every real token, -100 at padding.
        lengths: real tokens of each row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T, the real tokens."""
        return sum(self.lengths)

    @property
    def padded(self) -> bool:
        """Whether a row is shorter than the batch."""
        return self.tokens < self.input_ids.numel()

    def rows(self, start: int, end: int) -> Batch:
        """Some of the rows, as wide as before."""
        parts = (x[start:end] for x in (self.input_ids, self.attention_mask, self.labels))
        return Batch(*parts, self.lengths[start:end])


def make_batch(base: nn.Module, lengths: Sequence[int], *, causal: bool, width: int | None = None) -> Batch:
    """Draw a batch for a model; the same lengths give the same numbers.

    Args:
        base: the model, for its vocabulary and device.
        lengths: real tokens of each row.
        causal: labels for every token instead of one for each row.
        width: N; the longest row when None.
    """
    rows, width = len(lengths), max(lengths) if width is None else width
    generator = torch.Generator().manual_seed(zlib.crc32(repr((tuple(lengths), width)).encode()))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(FIRST_WORD, base.config.vocab_size, (rows, width), generator=generator)
    pad = getattr(base.config, "pad_token_id", None)
    ids = ids.masked_fill(mask == 0, 0 if pad is None else pad)
    labels = ids.masked_fill(mask == 0, -100) if causal else torch.randint(0, 2, (rows,), generator=generator)
    return Batch(*(x.to(base.device) for x in (ids, mask, labels)), tuple(lengths))


@dataclass(frozen=True)
class Prompts:
    """The starting point of everything that trains, float32.

    Attributes:
        deep: (L, P, D), a hidden state for each layer and virtual token.
        prefix: (L, 2, Hkv, P, d), keys and values.
    """

    deep: Tensor
    prefix: Tensor


def make_prompts(base: nn.Module, length: int) -> Prompts:
    """Draw prompts of P virtual tokens for a model."""
    sizes = sizes_of(base)
    generator = torch.Generator().manual_seed(2)
    deep = torch.randn(sizes.num_layers, length, sizes.hidden_size, generator=generator) * _DEEP_STD
    shape = (sizes.num_layers, 2, sizes.num_kv_heads, length, sizes.head_dim)
    prefix = torch.randn(shape, generator=generator) * _PREFIX_STD
    return Prompts(deep.to(base.device), prefix.to(base.device))
