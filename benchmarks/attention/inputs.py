"""The tensors of a case: random normal data, laid out as transformers hands it to attention."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention.cases import Case

BANK_TASKS = 16


@dataclass(frozen=True)
class Inputs:
    """One batch, the same for every provider of a cell.

    Attributes:
        q: (B, H, N, d); k, v: (B, Hkv, N, d); views of (B, N, heads, d) memory.
        prompt_k, prompt_v: (Hkv, P, d).
        grad_out: (B, H, N, d), zero at padding: no loss reads a padding position.
        key_mask: (B, N) bool, or None without padding.
        bank_k, bank_v: (16, Hkv, P, d), one prompt for each of 16 tasks.
        prompt_index: (B,) int64, the task of each row.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prompt_k: Tensor
    prompt_v: Tensor
    grad_out: Tensor
    key_mask: Tensor | None
    bank_k: Tensor
    bank_v: Tensor
    prompt_index: Tensor

    @property
    def real(self) -> Tensor:
        """(B, N) bool, true at real tokens."""
        if self.key_mask is not None:
            return self.key_mask
        return torch.ones(self.q.shape[0], self.q.shape[2], dtype=torch.bool, device=self.q.device)


def make_inputs(case: Case, device: torch.device | str) -> Inputs:
    """Draw the inputs of a case; the same case gives the same numbers on the same device type."""
    device = torch.device(device)
    generator = torch.Generator(device=device)
    # Directions and peer sets of one shape share their data.
    generator.manual_seed(zlib.crc32(repr((case.name, case.B, case.N, case.P, case.d)).encode()))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=case.torch_dtype, device=device)

    def heads(count: int) -> Tensor:
        return draw(case.B, case.N, count, case.d).transpose(1, 2)

    lengths = torch.tensor(case.lengths, device=device)
    key_mask = torch.arange(case.N, device=device) < lengths[:, None] if case.padding else None
    grad_out = heads(case.H)
    if key_mask is not None:
        grad_out.masked_fill_(~key_mask[:, None, :, None], 0.0)
    return Inputs(
        q=heads(case.H), k=heads(case.Hkv), v=heads(case.Hkv),
        prompt_k=draw(case.Hkv, case.P, case.d), prompt_v=draw(case.Hkv, case.P, case.d),
        grad_out=grad_out, key_mask=key_mask,
        bank_k=draw(BANK_TASKS, case.Hkv, case.P, case.d),
        bank_v=draw(BANK_TASKS, case.Hkv, case.P, case.d),
        prompt_index=torch.arange(case.B, device=device) % BANK_TASKS,
    )  # fmt: skip
