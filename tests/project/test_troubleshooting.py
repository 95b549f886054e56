"""docs/troubleshooting.md quotes messages that the sources give."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# `...` in a quotation is what differs from one message to the next.
QUOTED = [" ".join(one.split()) for one in re.findall(r"^\*\*`(.+?)`\*\*", PAGE, flags=re.MULTILINE | re.DOTALL)]


def _text(node: ast.expr) -> str:
    """A string of the sources, with a zero character for what is filled in."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[dsg]", "\0", node.value) if isinstance(node.value, str) else ""
    return "".join(_text(part) for part in node.values) if isinstance(node, ast.JoinedStr) else "\0"


@functools.cache
def _messages() -> frozenset[str]:
    """Every string that something is called with, or that has a name; so no docstring."""
    found: set[str] = set()
    for path in (ROOT / "ptv2_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            given = node.args if isinstance(node, ast.Call) else [node.value] if isinstance(node, ast.Assign) else []
            found.update(_text(one) for one in given)
    return frozenset(found)


def _is_given(quoted: str) -> bool:
    # Where a quotation begins or ends with words, so does the message.
    pattern = re.compile(".*".join(re.escape(part) for part in quoted.split("...")), flags=re.DOTALL)
    return any(pattern.fullmatch(message) for message in _messages())


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_one_that_is_given(quoted):
    assert len(quoted.replace("...", "").strip()) > 12, "so few words are in any message"
    assert _is_given(quoted)


def test_a_message_that_nobody_gives_is_seen():
    assert len(QUOTED) > 30
    assert not _is_given("prompts train at a learning rate of ..., which suits nobody")
    assert not _is_given("must be a transformers PreTrainedModel")
