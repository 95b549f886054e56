"""Labels: the names of the classes or tags, and what two spellings of one label are."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

_IOB = re.compile(r"O|[BI]-\S+")
_INTEGER = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?")


@dataclass(frozen=True)
class LabelSet:
    """The names of the classes, in the order of the model's outputs.

    Raises:
        ValueError: no name, or a name twice.

    Example:
        ```python
        from ptv2_fast.training.data import LabelSet

        tags = LabelSet.from_examples([{"tokens": ["in", "Oslo"], "tags": ["O", "B-place"]}])
        assert tags.names == ("O", "B-place", "I-place")
        assert tags.to_id("B-place") == 1 and tags.to_name(0) == "O"
        ```
    """

    names: tuple[str, ...]
    _ids: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = tuple(self.names)
        if not names:
            raise ValueError("names: expected at least one label; got none")
        ids = {name: index for index, name in enumerate(names)}
        if len(ids) != len(names):
            raise ValueError(f"names: labels must differ; got {list(names)}")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "_ids", ids)

    @classmethod
    def from_examples(cls, examples: Iterable[Mapping[str, Any]]) -> LabelSet:
        """The labels (one or several an example) or tags that occur in the examples.

        Labels that are all integers keep numeric order, others are sorted as text. Tags are O, then
        B-x and I-x of each type x in alphabetic order, whether or not both occur: held-out text may
        have a long entity of a type that training text has only as single words. Tags of no entities, such as parts of
        speech, are those that occur.

        Raises:
            ValueError: the examples have neither labels nor tags, or lists of labels that are all empty.
        """
        labels: set[str] = set()
        tags: set[str] = set()
        tagged = listed = False
        for example in examples:
            if "tags" in example:
                tagged = True
                tags.update(example["tags"])
            elif "label" in example:
                labels.add(example["label"])
            listed = listed or "labels" in example
            labels.update(example.get("labels", ()))
        if tagged and not all(map(_IOB.fullmatch, tags)):
            return cls(("O",) * ("O" in tags) + tuple(sorted(tags - {"O"})))
        if tagged:
            types = {tag[2:] for tag in tags if tag != "O"}
            return cls(("O", *(f"{side}-{kind}" for kind in sorted(types) for side in "BI")))
        if not labels and listed:
            raise ValueError("examples: expected a label in at least one example; every list of labels is empty")
        if not labels:
            raise ValueError("examples: expected 'label' or 'tags' in the examples; found neither")
        if all(_INTEGER.fullmatch(label) for label in labels):
            return cls(tuple(sorted(labels, key=lambda label: (int(label), label))))
        return cls(tuple(sorted(labels)))

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def to_id(self, name: str) -> int:
        """The index of a label; ValueError when it is not one of `names`."""
        if name not in self._ids:
            raise ValueError(f"label: must be one of {list(self.names)}; got {name!r}")
        return self._ids[name]

    def to_name(self, index: int) -> str:
        """The label at an index; ValueError when it is out of range."""
        if not 0 <= index < len(self.names):
            raise ValueError(f"index: must be in [0, {len(self.names)}); got {index!r}")
        return self.names[index]


def same_spelled_twice(names: Iterable[str]) -> tuple[str, str] | None:
    """Two labels that are one number (`1` and `1.0`) or one word in two encodings of it, if there are two."""
    seen: dict[object, str] = {}
    for name in sorted(names):
        plain = unicodedata.normalize("NFC", name)
        earlier = seen.setdefault(Decimal(plain) if _NUMBER.fullmatch(plain) else plain, name)
        if earlier != name:
            return earlier, name
    return None


def differing_by_case(names: Iterable[str]) -> list[str]:
    """The labels that differ from another one by upper and lower case alone."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(name.casefold(), []).append(name)
    return [name for group in groups.values() if len(group) > 1 for name in group]
