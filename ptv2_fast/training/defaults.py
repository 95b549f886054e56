"""What the command line trains with where nobody says otherwise: what the table of measured quality chose.

Source: benchmarks/results/quality_minilm_cpu.json, of which docs/choosing.md has the table: the candidate with the best
dev score of each task and injection on MiniLM, and the run of SmolLM2 for text. Deep and prefix prompts of 64 tokens at
1e-2 for classes, deep ones of 32 and prefixes of 64 at 2e-2 for tags, shallow ones of 20 at 1e-2 for both, deep ones of
16 at 5e-3 in 3 epochs for text; a head over rows read their mean. Tasks that were not measured have what classes have.
The best epoch of prompts was the last one, or nearly, of the 3 to 7 that there was time for: more of them, 10, of which
the best by dev is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptv2_fast.task_types import TASKS


@dataclass(frozen=True)
class Defaults:
    """P, the learning rate at the start, and passes over the data."""

    num_virtual_tokens: int = 64
    learning_rate: float = 1e-2
    epochs: int = 10


def defaults_for(task_type: str, injection: str) -> Defaults:
    """The settings of a task's prompts; of an unknown task anything, which whoever knows the tasks refuses."""
    gives = TASKS[task_type].gives if task_type in TASKS else ""
    if gives == "text":
        return Defaults(16, 5e-3, 3)
    if injection == "shallow":
        return Defaults(num_virtual_tokens=20)
    if gives == "token":
        return Defaults(32 if injection == "deep" else 64, 2e-2)
    return Defaults()


def pooling_for(task_type: str, *, causal: bool) -> str:
    """What of a row a head reads: of a decoder's the last token, the only one that has seen the others."""
    if causal:
        return "last"
    return "mean" if task_type == "SEQ_CLS" else "first"
