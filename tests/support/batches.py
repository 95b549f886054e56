"""Small padded batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_models import PADDING_ID, VOCABULARY


@dataclass(frozen=True)
class Batch:
    """One batch with its padding somewhere, and where each row's own tokens stand."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def real(self, output: Tensor, row: int) -> Tensor:
        """The entries of (B, N, ...) that stand at the row's own tokens."""
        return output[row][self.attention_mask[row].bool()]


def text_rows(*lengths: int, seed: int = 3) -> list[Tensor]:
    """Rows of random word ids, none of them the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator) for n in lengths or (5, 2, 7)]


def padded(rows: list[Tensor], side: str, width: int = 9) -> Batch:
    """The rows padded to a width on the left, on the right, or with holes between their tokens."""
    input_ids = torch.full((len(rows), width), PADDING_ID)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    generator = torch.Generator().manual_seed(11)
    for index, row in enumerate(rows):
        if side == "holes":
            where = torch.randperm(width, generator=generator)[: len(row)].sort().values
        else:
            first = width - len(row) if side == "left" else 0
            where = torch.arange(first, first + len(row))
        input_ids[index, where] = row
        attention_mask[index, where] = 1
    return Batch(input_ids, attention_mask)


def packed(rows: list[Tensor]) -> dict[str, Tensor]:
    """The rows one behind the other in one row, with positions that restart."""
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }
