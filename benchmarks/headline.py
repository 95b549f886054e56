"""The few rows of the front page: what a card measured, ours beside a peer of the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.goals import Cell, comparable

_QUERIES = "B 32, N 512, P 128"
_PADDED = "bert-base-B32-N128-P20-pad40-bf16"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: in words.
        suite, cell: where it was measured.
        ours: one of our providers.
        peer, called: another provider, and how the front page names it.
    """

    what: str
    suite: str
    cell: str
    ours: str
    peer: str
    called: str


ROWS = (
    Row(f"attention of RoBERTa-large, forward and backward, {_QUERIES}, 40 % padding", "kernels",
        "roberta-large-training-B32-N512-P128-d64-full-pad40-bf16", "ours_packed", "sdpa_user",
        "concat, mask and SDPA"),
    Row(f"the same without padding, {_QUERIES}", "kernels",
        "roberta-large-training-B32-N512-P128-d64-full-pad0-bf16", "ours", "cudnn",
        "cuDNN over keys that are joined already"),
    Row("attention of Llama-3-8B, causal, forward and backward, B 8, N 2048, P 128", "kernels",
        "llama-3-8b-training-B8-N2048-P128-d128-causal-pad0-bf16", "ours", "sdpa_outside",
        "SDPA over joined keys and a mask made before"),
    Row("training step of BERT-base, B 32, N 128, P 20, 40 % padding, captured", "steps", _PADDED, "ours_graph",
        "peft", "PEFT's prefix tuning"),
    Row("the same", "steps", _PADDED, "ours_graph", "peft_compiled", "the same, compiled with CUDA graphs"),
    Row("the same, captured by the model's own forward (Trainer, any loop; the default)", "steps", _PADDED,
        "ours_captured", "peft", "PEFT's prefix tuning"),
    Row("the same, eager", "steps", _PADDED, "ours", "peft", "PEFT's prefix tuning"),
    Row("training step of Llama-3-8B's shape, B 8, N 512, P 128, 40 % padding, captured", "steps",
        "llama-3-8b-B8-N512-P128-pad40-bf16", "ours_graph", "peft", "PEFT's prefix tuning"),
    Row("the same without padding", "steps", "llama-3-8b-B8-N512-P128-pad0-bf16", "ours_graph", "peft",
        "PEFT's prefix tuning"),
    Row("training step of Qwen3-0.6B's shape, B 8, N 512, P 64, 40 % padding, captured, layers compiled", "steps",
        "qwen3-0.6b-B8-N512-P64-pad40-bf16", "ours_graph_compiled", "peft", "PEFT's prefix tuning"),
    Row("a generated token of Qwen3-0.6B, B 64, P 512, compiled", "decode",
        "qwen3-0.6b-decode-B64-P512-N32-new32-bf16", "ours_compiled", "peft", "PEFT's generate"),
)  # fmt: skip


def rows(cells_of: Callable[[str], list[Cell]]) -> list[list[str]]:
    """A line for each comparison that was measured.

    Args:
        cells_of: every measurement of a suite's cells on a card, oldest first.
    """
    lines = []
    for row in ROWS:
        pairs = [comparable(cell, row.ours, row.peer) for cell in cells_of(row.suite) if cell["id"] == row.cell]
        measured = [pair for pair in pairs if all(pair)]
        if measured:
            ours, peer = measured[-1]
            lines.append([row.what, f"{ours:.3g} ms", f"{peer:.3g} ms", row.called, f"{peer / ours:.2f}×"])
    return lines
