"""Label Studio's JSON export: tasks with the spans or the choices that somebody marked in a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_task(values: Mapping[str, Any]) -> bool:
    """Whether a record is a task of Label Studio."""
    return isinstance(values.get("data"), dict) and any(name in values for name in ("annotations", "completions"))


def task_values(where: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """A task's columns: what it was imported with, a single text as "text", and "spans" or "labels" (choices).

    Returns:
        None where nobody has submitted an annotation.

    Raises:
        ValueError: an annotation is no list of spans or choices, or two annotators disagree.
    """
    given = values.get("annotations", values.get("completions"))
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise ValueError(f"{where}: expected a list of annotations; got {given!r}")
    done = [one for one in given if not one.get("was_cancelled") and not one.get("skipped")]
    if not done:
        return None
    found = [_marked(where, one.get("result")) for one in done]
    if any(other != found[0] for other in found[1:]):
        raise ValueError(
            f"{where}: {len(found)} annotations of one text differ; keep one of each task in the export's 'annotations'"
        )
    data = values["data"]
    texts = [name for name, value in data.items() if isinstance(value, str)]
    # Whatever it was called there, a single text is the text.
    named = {"text" if [name] == texts else name: value for name, value in data.items()}
    return {**named, **found[0]}


def _marked(where: str, result: Any) -> dict[str, Any]:
    """What one annotation says: {"spans"}, sorted, or {"labels"}."""
    if not isinstance(result, list):
        raise ValueError(f"{where}: expected a list as an annotation's 'result'; got {result!r}")
    spans, chosen = [], []
    for one in result:
        if isinstance(one, dict) and one.get("type") == "relation":
            continue  # An arrow between two spans, which says nothing of either.
        value = one.get("value") if isinstance(one, dict) else None
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a result with a 'value'; got {one!r}")
        if "choices" in value:
            chosen += list(value["choices"])
        elif "start" in value and "end" in value:
            spans.append({key: value[key] for key in ("start", "end", "labels", "text") if key in value})
        else:
            raise ValueError(f"{where}: expected spans (start, end, labels) or choices; got {value!r}")
    if spans and chosen:
        raise ValueError(f"{where}: expected spans or choices; the annotation has both")
    if chosen:
        return {"labels": sorted(chosen)}
    return {"spans": sorted(spans, key=lambda span: str(span))}
