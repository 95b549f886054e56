"""What people type as examples."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from ptv2_fast.training.data.examples import json_object
from ptv2_fast.training.data.tasks import reading_task, task_row
from ptv2_fast.training.data.text_files import typed_lines
from ptv2_fast.training.tasks import training_task

logger = logging.getLogger(__name__)


def examples_of(
    lines: Iterable[str], task_type: str, *, where: str = "text", context: str | None = None
) -> list[dict[str, Any]]:
    """Unlabelled examples from lines of text, blank ones left out.

    A line is a text (SEQ_CLS), a sentence (TOKEN_CLS), a prompt (CAUSAL_LM), or a question about
    `context` (QUESTION_ANS); without a context it is a JSON object with "question" and "context", and with "text" and
    "choices" in any case (MULTIPLE_CHOICE).

    Raises:
        ValueError: there is no line with text, one holds what is no character or is not such an object, or the lines do
            not go together.
    """
    task = training_task(task_type)
    typed = typed_lines(lines, where)
    examples = [task.typed(line, place, number, context) for number, place, line in typed]
    if task_row(task_type).predicts not in ("answer", "choice"):
        objects = [place for _, place, line in typed if json_object(line) is not None]
        if objects:
            logger.warning(
                "%s: %d lines are JSON objects, which are read as texts, this the first; --file reads what is in them",
                objects[0],
                len(objects),
            )
    check = reading_task(task_type).check
    if check is not None:
        check(where, examples, [], None)
    return examples
