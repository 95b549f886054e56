"""What was expected of a card before it was asked, beside what it gave, read from result files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH = (
    f"2026-11-26-card-{name}-h200.json" for name in ("first", "second", "third", "fourth", "fifth")
)
_D64, _D128 = "roberta-large-{}-B32-N512-P128-d64-full-pad0-bf16", "t5-3b-encoder-{}-B32-N512-P128-d128-full-pad0-bf16"
_BERT = "bert-base-B32-N128-P20-pad40-bf16"


@dataclass(frozen=True)
class Prediction:
    """One figure that was expected.

    Attributes:
        what: in words.
        predicted: the figure; of the machine-code model its rate times 0.78, as for other kernels whose rate is known.
        unit: of both figures.
        file, cell, provider, quantity: where the measured figure stands in a result file.
        over: a provider to divide by.
    """

    what: str
    predicted: float
    unit: str
    file: str
    cell: str
    provider: str
    quantity: str
    over: str | None = None

    def measured(self, results: Iterable[Mapping]) -> float | None:
        """The figure that came; None where the file or the cell is not there."""
        for data in results:
            for cell in data["cells"] if data.get("file") == self.file else ():
                if cell["id"] == self.cell:
                    entries = cell.get("peers", {})
                    ours, other = (entries.get(name, {}).get(self.quantity) for name in (self.provider, self.over))
                    if ours and (other or self.over is None):
                        return ours / other if other else ours
        return None


PREDICTIONS = (
    Prediction("forward, d = 64, first launches", 246, "TFLOP/s", _FIRST, _D64.format("forward"), "ours", "tflops"),
    Prediction("forward, d = 64, two blocks a multiprocessor", 350, "TFLOP/s", _SECOND, _D64.format("forward"),
               "ours", "tflops"),
    Prediction("forward, d = 128, first launches", 277, "TFLOP/s", _FIRST, _D128.format("forward"), "ours", "tflops"),
    Prediction("forward, d = 128, two blocks a multiprocessor", 452, "TFLOP/s", _SECOND, _D128.format("forward"),
               "ours_tuned", "tflops"),
    Prediction("backward, d = 64, first launches", 165, "TFLOP/s", _FIRST, _D64.format("backward"), "ours", "tflops"),
    Prediction("backward, d = 64, whole tensor tiles", 258, "TFLOP/s", _THIRD, _D64.format("backward"),
               "ours", "tflops"),
    Prediction("backward, d = 128, first launches", 54, "TFLOP/s", _FIRST, _D128.format("backward"), "ours", "tflops"),
    Prediction("backward, d = 128, whole tensor tiles", 263, "TFLOP/s", _SECOND, _D128.format("backward"),
               "ours_tuned", "tflops"),
    Prediction("eager step of BERT-base over PEFT's", 1.55, "×", _FIRST, _BERT, "ours", "ms", "peft"),
    Prediction("the same with repeated launches", 1.0, "×", _THIRD, _BERT, "ours", "ms", "peft"),
    Prediction("captured step of BERT-base", 3.5, "ms", _FIRST, _BERT, "ours_graph", "ms"),
    Prediction("the same with fewer kernels and a cheaper host", 4.7, "ms", _THIRD, _BERT, "ours_graph", "ms"),
    Prediction("compiled PEFT, the same step", 5.0, "ms", _THIRD, _BERT, "peft_compiled", "ms"),
    Prediction("a generated token of Qwen3-0.6B over PEFT's, eager", 2.5, "×", _FIRST,
               "qwen3-0.6b-decode-B64-P512-N32-new32-bf16", "ours", "ms", "peft"),
    Prediction("captured step of Qwen3-0.6B with compiled layers", 30, "ms", _THIRD,
               "qwen3-0.6b-B8-N512-P64-pad40-bf16", "ours_graph_compiled", "ms"),
    Prediction("backward, d = 64, hidden keys not loaded", 230, "TFLOP/s", _FOURTH, _D64.format("backward"),
               "ours", "tflops"),
    Prediction("FlexAttention with concat over training attention", 1.1, "×", _FOURTH,
               "roberta-large-training-B32-N512-P128-d64-full-pad0-bf16-flex", "flex_concat", "ms", "ours"),
    Prediction("captured step of BERT-base over the compiled prompt-less model", 0.9, "×", _FOURTH, _BERT,
               "ours_graph", "ms", "floor_compiled"),
    Prediction("PEFT over a captured step of Qwen3-0.6B with compiled layers", 2.4, "×", _FOURTH,
               "qwen3-0.6b-B8-N512-P64-pad40-bf16", "peft", "ms", "ours_graph_compiled"),
    Prediction("a step of 16 tasks over one of one task", 1.1, "×", _FOURTH,
               "bert-base-B32-N128-P20-pad0-bf16-tasks16", "ours_tasks16", "ms", "ours"),
    Prediction("backward, d = 64, statistics copied without predicates", 255, "TFLOP/s", _FIFTH,
               _D64.format("backward"), "ours", "tflops"),
    Prediction("backward, d = 128, the same", 285, "TFLOP/s", _FIFTH, _D128.format("backward"), "ours", "tflops"),
    Prediction("captured step of BERT-base, a third of the host's work", 3.75, "ms", _FIFTH, _BERT, "ours_graph", "ms"),
    Prediction("the same captured by the model's own forward", 4.3, "ms", _FIFTH, _BERT, "ours_captured", "ms"),
    Prediction("eager step of BERT-base, views kept", 24, "ms", _FIFTH, _BERT, "ours", "ms"),
    Prediction("compiled PEFT over a captured step, B 8, N 64", 1.5, "×", _FIFTH,
               "bert-base-B8-N64-P20-pad40-bf16", "peft_compiled", "ms", "ours_graph"),
)  # fmt: skip


def rows(results: list[Mapping]) -> list[list[str]]:
    """A line for each prediction whose figure came."""
    found = []
    for one in PREDICTIONS:
        measured = one.measured(results)
        if measured is not None:
            found.append([
                one.what, f"{one.predicted:g} {one.unit}", f"{measured:.3g} {one.unit}",
                f"{measured / one.predicted:.2f}", one.file,
            ])  # fmt: skip
    return found
