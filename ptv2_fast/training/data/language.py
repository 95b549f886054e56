"""Text to go on with: plain, a prompt with what follows it, or a chat; from columns to examples of CAUSAL_LM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptv2_fast.training.data.chat import chat_columns, chat_example, check_answered, is_written_out, messages_of
from ptv2_fast.training.data.columns import TEXT_COLUMNS, Table, Wanted
from ptv2_fast.training.data.examples import text_of, value_of
from ptv2_fast.training.data.rows import Row
from ptv2_fast.training.labels import LabelSet

HEADERS = ("instruction", "output")


def continued(table: Table, wanted: Wanted) -> dict[str, str]:
    """Text, a chat, or prompts and what follows them."""
    chat = chat_columns(table, wanted)
    if chat is not None and (wanted.texts or not _other_layouts(table, chat, wanted)):
        return chat
    if wanted.texts:
        return {"text": table.need(wanted.texts[0], "text_column")}
    parts = ("prompt", "completion") if wanted.labelled else ("prompt",)
    if wanted.prompt is not None or wanted.completion is not None:
        names = {"prompt": wanted.prompt or "prompt", "completion": wanted.completion or "completion"}
        return {part: table.need(names[part], f"{part}_column") for part in parts}
    found: list[tuple[str, ...]] = [(name,) for name in TEXT_COLUMNS if name in table.names]
    if all(part in table.names for part in parts):
        found.append(parts)
    deciding = "text_column, prompt_column, completion_column"
    table.refuse_several(found, deciding)
    if not found:
        raise table.missing(f"a column of {list(TEXT_COLUMNS)}, a chat, or 'prompt' and 'completion'", deciding)
    unread = () if wanted.labelled or found[0] != parts else ("completion",)
    table.refuse_other_texts([*found[0], *unread], deciding, 1)
    return {"text": found[0][0]} if found[0] != parts else dict(zip(parts, parts, strict=True))


def _other_layouts(table: Table, chat: Mapping[str, str], wanted: Wanted) -> bool:
    """Whether a table has texts besides its chat, which are then refused as what could be meant too."""
    if "instruction" in chat and is_written_out(table):
        return False
    parts = ("prompt", "completion") if wanted.labelled else ("prompt",)
    others: list[tuple[str, ...]] = [(name,) for name in TEXT_COLUMNS if name in table.names]
    others += [parts] if all(part in table.names for part in parts) else []
    found = [tuple(name for role, name in chat.items() if role in ("messages", "asked", "instruction", "output"))]
    table.refuse_several(found + others, "text_column, prompt_column, completion_column")
    return bool(others)


def language_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    """{"text"}, {"prompt", "completion"} as texts or as lists of messages, or {"messages"}."""
    if "prompt" not in roles and "text" not in roles:
        return chat_example(row, roles)
    lists = {role for role, column in roles.items() if isinstance(value_of(row, column), list)}
    if not lists:
        return {role: text_of(row, column) for role, column in roles.items()}
    if lists != set(roles):
        kinds = {column: type(row.values[column]).__name__ for column in roles.values()}
        raise ValueError(f"{row.where}: expected texts, or lists of messages, in all of {list(kinds)}; got {kinds}")
    example: dict[str, Any] = {role: messages_of(row, column, row.values[column]) for role, column in roles.items()}
    if "completion" in example:
        check_answered(row, example["completion"])
    return example
