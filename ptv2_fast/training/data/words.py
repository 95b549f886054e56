"""Words: how a text is split where nobody has split it, for what people type and for spans of characters."""

from __future__ import annotations

import re

# Words with inner apostrophes and hyphens, numbers with inner points and commas, other signs alone.
_WORD = re.compile(r"\w+(?:['’\-.,]\w+)*|[^\w\s]")


def words_of(text: str) -> list[str]:
    """The words and signs of a sentence, split as tagged corpora split them."""
    return _WORD.findall(text)


def places_of(text: str) -> list[tuple[int, int]]:
    """The first character of each of `words_of(text)`, and the one behind it."""
    return [found.span() for found in _WORD.finditer(text)]
