"""What people type as examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ptv2_fast.training.data.examples import check_text
from ptv2_fast.training.data.tasks import reading_task
from ptv2_fast.training.tasks import training_task


def examples_of(
    lines: Iterable[str], task_type: str, *, where: str = "text", context: str | None = None
) -> list[dict[str, Any]]:
    """Unlabelled examples from lines of text, blank ones left out.

    A line is a text (SEQ_CLS), a sentence (TOKEN_CLS), a prompt (CAUSAL_LM), or a question about
    `context` (QUESTION_ANS); without a context it is a JSON object with "question" and "context", and with "text" and
    "choices" in any case (MULTIPLE_CHOICE).

    Raises:
        ValueError: there is no line with text, a line is not such an object, or the lines do not go together.
    """
    task = training_task(task_type)
    examples: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{where}, line {number}"
            examples.append(task.typed(check_text(place, line), place, number, context))
    if not examples:
        raise ValueError(f"{where}: expected at least one line with text; got none")
    check = reading_task(task_type).check
    if check is not None:
        check(where, examples, [], None)
    return examples
