"""The cells of the decode suite, in the order in which a short run should meet them."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

import torch

from benchmarks.attention.cases import DTYPES


@dataclass(frozen=True)
class DecodeCase:
    """Greedy generation for B rows behind one prompt of P.

    Attributes:
        model: key of `step.models.SHAPES`, a causal one.
        B, P: rows and virtual tokens.
        N: text tokens that every row starts with.
        new: tokens that every row then gets.
        dtype: key of `attention.cases.DTYPES`.
    """

    model: str
    B: int
    P: int
    N: int = 32
    new: int = 32
    dtype: str = "bf16"

    @property
    def id(self) -> str:
        """A name that no other cell has."""
        return f"{self.model}-decode-B{self.B}-P{self.P}-N{self.N}-new{self.new}-{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights and the prompt."""
        return DTYPES[self.dtype]

    def as_dict(self) -> dict[str, object]:
        """The case as JSON values."""
        return {**asdict(self), "causal": True}


def decode_cases() -> list[DecodeCase]:
    """The grid: the cells that decide D1 to D3 first."""
    headline = [
        DecodeCase("qwen3-0.6b", 64, 512),  # D1, D3
        DecodeCase("llama-3-8b", 128, 2048),  # D2
        DecodeCase("llama-3-8b", 64, 512),  # D3
        DecodeCase("qwen3-0.6b", 8, 512),
        DecodeCase("llama-3-8b", 8, 512),
    ]
    grid = [
        DecodeCase(model, B, P)
        for P, B, model in itertools.product((512, 2048, 128), (64, 8, 1, 128), ("qwen3-0.6b", "llama-3-8b"))
    ]
    return list({case.id: case for case in (*headline, *grid)}.values())


def tiny_decode_cases() -> list[DecodeCase]:
    """What a CPU gets through in seconds."""
    return [DecodeCase("tiny-qwen3", 3, 6, N=5, new=4, dtype="fp32")]


def cpu_decode_cases() -> list[DecodeCase]:
    """Nothing: there is no small language model of real weights among the packages that this suite needs."""
    return []
