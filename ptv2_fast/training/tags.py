"""Tags: IOB1, where B-x only parts neighbours of one type, and IOB2, where every entity begins with B-x."""

from __future__ import annotations

import re
from collections.abc import Sequence

TAG = re.compile(r"O|[BI]-\S+")


def stray_insides(tags: Sequence[str]) -> list[int]:
    """Where an I-x follows no B-x or I-x of its type: in IOB1 an entity begins there, in IOB2 nothing does."""
    before = ("O", *tags)
    return [
        index for index, tag in enumerate(tags) if tag.startswith("I-") and before[index] not in (tag, "B-" + tag[2:])
    ]


def to_iob2(tags: Sequence[str]) -> list[str]:
    """The same entities with a B-x at the beginning of each; IOB2 tags come back as they are."""
    found = list(tags)
    for index in stray_insides(tags):
        found[index] = "B-" + tags[index][2:]
    return found
