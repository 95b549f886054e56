"""Chats: what is said by whom, of the usual layouts, as messages {"role", "content"}.

messages       [{"role": "user", "content": "..."}, ...], in a column of that name or "conversation"
sharegpt       "conversations": [{"from": "human", "value": "..."}, ...], perhaps a column "system"
alpaca         "instruction", "output", perhaps "input", "system" and "history": [[user, assistant], ...]
prompts        "prompt" and "completion" as lists of messages; of these the completion alone is learned
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptv2_fast.training.data.columns import Table, Wanted
from ptv2_fast.training.data.rows import Row

CHATS = ("messages", "conversations", "conversation")
ALPACA = ("instruction", "input", "output", "system", "history")
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
_CALLS = ("tool_calls", "function_call", "tool_call")


def chat_columns(table: Table, wanted: Wanted) -> dict[str, str] | None:
    """Where a table has a chat: {"messages"}, perhaps "system", or the columns of alpaca; None where it has none.

    Where answers are not read, "messages" is called "asked", and alpaca has no "output".

    Raises:
        ValueError: there is more than one.
    """
    named, said = wanted.texts[0] if wanted.texts else None, "messages" if wanted.labelled else "asked"
    if wanted.prompt is not None or wanted.completion is not None:
        return None
    if named is not None:
        return {said: named, **_system(table)} if _holds_messages(table, named) else None
    found: list[tuple[str, ...]] = [(name,) for name in CHATS if _holds_messages(table, name)]
    needed = ("instruction", "output") if wanted.labelled else ("instruction",)
    if all(name in table.names for name in needed):
        found.append(needed)
    table.refuse_several(found, "text_column")
    if not found:
        return None
    if found[0] == needed:
        return {name: name for name in ALPACA if name in table.names and (wanted.labelled or name != "output")}
    return {said: found[0][0], **_system(table)}


def _system(table: Table) -> dict[str, str]:
    return {"system": "system"} if "system" in table.names else {}


def _holds_messages(table: Table, name: str) -> bool:
    values = [row.values.get(name) for row in table.rows]
    return any(isinstance(value, list | tuple) and value and isinstance(value[0], dict) for value in values)


def is_written_out(table: Table) -> bool:
    """Whether the column "text" is what alpaca's own columns say, as its first publication has it."""
    row = table.rows[0].values
    text, parts = row.get("text"), (row.get("instruction"), row.get("output"))
    return isinstance(text, str) and all(isinstance(part, str) and part in text for part in parts)


def chat_example(row: Row, roles: Mapping[str, str]) -> dict[str, Any]:
    """{"messages"}; where answers are not read {"prompt"}, the messages in front of the last answer.

    Raises:
        ValueError: a message is not one, there is nothing to learn, or nothing to answer.
    """
    column = roles.get("messages", roles.get("asked"))
    labelled = "messages" in roles or "output" in roles
    if column is not None:
        messages = messages_of(row, column, row.values.get(column))
        system = row.values.get("system") if "system" in roles else None
        if _said(system):
            messages = [_message(row, "'system'", "system", system), *messages]
    else:
        messages = _alpaca(row, roles)
    late = next((number for number, one in enumerate(messages, 1) if one["role"] == "system" and number > 1), None)
    if late is not None:
        raise ValueError(f"{row.where}, message {late}: expected 'system' as the first message alone")
    if not labelled:
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise ValueError(f"{row.where}: expected a message to answer; got none")
        return {"prompt": messages}
    check_answered(row, messages)
    return {"messages": messages}


def check_answered(row: Row, messages: Sequence[Mapping[str, str]]) -> None:
    """Refuse messages of which nothing is learned."""
    if not any(message["role"] == "assistant" for message in messages):
        said = [message["role"] for message in messages]
        raise ValueError(f"{row.where}: expected a message of the assistant, which is what is learned; got {said}")


def messages_of(row: Row, column: str, value: Any) -> list[dict[str, str]]:
    """A list of messages, in whichever of their layouts.

    Raises:
        ValueError: it is none; the message says which of them.
    """
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{row.where}: expected a list of messages in {column!r}; got {value!r}")
    found = []
    for number, message in enumerate(value, start=1):
        where = f"{row.where}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: expected an object with a role and a content in {column!r}; got {message!r}")
        calls = next((name for name in _CALLS if message.get(name)), None)
        if calls is not None:
            raise ValueError(f"{where}: expected text alone; {calls!r} is not read")
        if message.get("weight", 1) not in (1, None):
            raise ValueError(f"{where}: 'weight' must be 1, as all that is learned counts; got {message['weight']!r}")
        role, content = _either(message, "role", "from"), _either(message, "content", "value")
        if role not in _ROLES:
            raise ValueError(f"{where}: expected a role of {', '.join(_ROLES)} in {column!r}; got {role!r}")
        found.append(_message(row, f"{column}, message {number}", _ROLES[role], content))
    return found


def _said(value: Any) -> bool:
    """Whether a part that need not be there is: blanks are none."""
    return bool(value.strip() if isinstance(value, str) else value)


def _either(message: Mapping[str, Any], name: str, other: str) -> Any:
    return message[name] if message.get(name) is not None else message.get(other)


def _message(row: Row, what: str, role: str, content: Any) -> dict[str, str]:
    if isinstance(content, list | tuple) and content:
        # Parts, as some interfaces write texts that could have stood beside pictures.
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(map(str, parts)) if len(parts) == len(content) and None not in parts else content
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{row.where}: expected text in {what} of {role!r}; got {content!r}")
    return {"role": role, "content": content}


def _alpaca(row: Row, roles: Mapping[str, str]) -> list[dict[str, str]]:
    values = {role: row.values.get(column) for role, column in roles.items()}
    messages = []
    if _said(values.get("system")):
        messages.append(_message(row, "'system'", "system", values["system"]))
    for number, pair in enumerate(values.get("history") or (), start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{row.where}: expected pairs [user, assistant] in 'history'; got {pair!r}")
        both = zip(("user", "assistant"), pair, strict=True)
        messages += [_message(row, f"'history', pair {number}", role, said) for role, said in both]
    asked = _message(row, "'instruction'", "user", values["instruction"])
    if _said(values.get("input")):
        more = _message(row, "'input'", "user", values["input"])
        asked = {"role": "user", "content": f"{asked['content']}\n\n{more['content']}"}
    messages.append(asked)
    return [*messages, _message(row, "'output'", "assistant", values["output"])] if "output" in roles else messages
