"""Chats as text: rendered by the tokenizer's chat template, with the assistant's turns as what is learned.

Without a template a message is `Role: content` and an empty line behind it, the assistant's with the end-of-text token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ptv2_fast.task_types import IGNORED_LABEL

logger = logging.getLogger(__name__)

Message: TypeAlias = Mapping[str, str]
# What is said of a tokenizer without a template, once a tokenizer.
_WITHOUT = (
    "the tokenizer has no chat template: chats are written as `User: ...` and `Assistant: ...`, parted by empty lines"
)


def is_chat(example: Mapping[str, Any]) -> bool:
    """Whether an example is of messages."""
    return "messages" in example or isinstance(example.get("prompt"), list)


def say_template(tokenizer: Any) -> None:
    """Warn where chats are written without a template."""
    if not tokenizer.chat_template:
        logger.warning("%s", _WITHOUT)


def rendered(messages: Sequence[Message], tokenizer: Any, where: str, *, asking: bool = False) -> str:
    """Messages as the model reads them; with `asking`, up to where the assistant's answer begins.

    Raises:
        ValueError: the template does not take the messages.
    """
    if not tokenizer.chat_template:
        return _plainly(messages, tokenizer, asking)
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asking)
    except Exception as error:  # templates raise what they like; the message is theirs
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{where}: the chat template does not take messages of {roles}: {error}") from error
    return text


def _plainly(messages: Sequence[Message], tokenizer: Any, asking: bool) -> str:
    ending = tokenizer.eos_token or ""
    texts = [
        f"{message['role'].capitalize()}: {message['content']}{ending if message['role'] == 'assistant' else ''}\n\n"
        for message in messages
    ]
    return "".join(texts) + ("Assistant:" if asking else "")


def learned_texts(example: Mapping[str, Any], tokenizer: Any, where: str) -> list[tuple[str, list[tuple[int, int]]]]:
    """Texts of a chat, each with the characters [start, end) that are learned: the assistant's turns.

    One text for the whole chat, where each turn stands in it as it stood when it was asked for; else one for each turn,
    since some templates write earlier turns otherwise than the last.

    Raises:
        ValueError: the template does not take the messages, or does not write an answer behind what asks for it.
    """
    begin = 0 if "messages" in example else len(example["prompt"])
    messages = list(example["messages"] if "messages" in example else [*example["prompt"], *example["completion"]])
    turns = []
    for index, message in enumerate(messages):
        if index < begin or message["role"] != "assistant":
            continue
        asked = rendered(messages[:index], tokenizer, where, asking=True)
        answered = rendered(messages[: index + 1], tokenizer, where)
        if not answered.startswith(asked):
            raise ValueError(
                f"{where}: expected the chat template to write message {index + 1} behind what asks for it;"
                f" it writes {answered[-80:]!r} where {asked[-80:]!r} asks"
            )
        turns.append((answered, (len(asked), len(answered))))
    whole = rendered(messages, tokenizer, where)
    if all(whole.startswith(answered) for answered, _ in turns):
        return [(whole, [place for _, place in turns])]
    return [(answered, [place]) for answered, place in turns]


def encode_chat(example: Mapping[str, Any], tokenizer: Any, where: str) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of a chat's texts; the labels of what is not learned are -100.

    The end-of-text token follows a text whose template has none in its last turn.

    Raises:
        ValueError: as `learned_texts`.
    """
    rows = []
    for text, places in learned_texts(example, tokenizer, where):
        encoding = tokenizer(text, add_special_tokens=_adds_specials(tokenizer), return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        labels, ended = [], False
        for token, (start, end) in zip(ids, encoding["offset_mapping"], strict=True):
            learned = end > start and any(end > low and start < high for low, high in places)
            labels.append(token if learned else IGNORED_LABEL)
            ended = ended or (token == tokenizer.eos_token_id and start >= places[-1][0])
        if tokenizer.eos_token_id is not None and not ended:
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        rows.append((ids, labels))
    return rows


def prompt_inputs(prompt: Any, tokenizer: Any, *, chats: bool, **options: Any) -> Any:
    """What the model goes on from, tokenized.

    Args:
        prompt: a text, or messages.
        chats: whether training read chats; a text is then what a user says.
        options: of the tokenizer.
    """
    if isinstance(prompt, str) and not chats:
        return tokenizer(prompt, **options)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = rendered(messages, tokenizer, "prompt", asking=True)
    return tokenizer(text, add_special_tokens=_adds_specials(tokenizer), **options)


def _adds_specials(tokenizer: Any) -> bool:
    """Whether the tokens that begin a text are still missing: a template has written them already."""
    return not tokenizer.chat_template
