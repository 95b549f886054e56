"""Tags: the schemes that say where entities begin and end, told by the tags of a whole file, and all of them as IOB2.

    BIO (IOB2)     every entity begins with B-x, its other words are I-x
    IOB1           I-x begins one too; B-x only parts neighbours of one type
    BIOES          the last word is E-x, a single one S-x
    BILUO          the last word is L-x, a single one U-x
    BMES, BMEWO    the words between are M-x, a single one S-x or W-x
    IO             the type alone: neighbours of one type are one entity
    plain          each word has a class of its own, and there are no entities

Written otherwise, `B_PER`, `PER-B`, `b-per`, `0` for O, or B and I without a type, they are the same tags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

TAG = re.compile(r"O|[BI]-\S+")
# Scheme -> the letters in front of its types, in the order in which they are tried.
_LETTERS = {"BIO": "BI", "IOB1": "BI", "BIOES": "BIES", "BILUO": "BILU", "BMES": "BMES", "BMEWO": "BMEW"}
SCHEMES = (*_LETTERS, "IO", "plain")
_BEGINS, _GOES_ON = "BSUW", "IM"
_OUTSIDE = ("O", "o", "0")
# The type of entities whose tags name none.
UNNAMED = "SPAN"
_IN_FRONT = re.compile(r"([BIESLUMWbieslumw])[-_](\S+)")
_BEHIND = re.compile(r"(\S+)[-_]([BIESLUMW])")
_WITHOUT_TYPE = re.compile(r"[BIESLUMW][-_]?")


@dataclass(frozen=True)
class Scheme:
    """How tags are to be understood.

    Attributes:
        name: one of `SCHEMES`.
        parts: tag -> (its letter, its type); O is ("O", ""). Of plain tags there are none.
    """

    name: str
    parts: Mapping[str, tuple[str, str]]

    @property
    def rewritten(self) -> bool:
        """Whether tags are written otherwise than IOB2 has them, whatever the scheme."""
        return any(
            tag != (letter if letter == "O" else f"{letter}-{kind}") for tag, (letter, kind) in self.parts.items()
        )


class UnclearTags(ValueError):
    """Tags of which it cannot be told how they are meant; `tag` is one that does not fit."""

    def __init__(self, tag: str, message: str):
        super().__init__(message)
        self.tag = tag


def scheme_of(sentences: Collection[Sequence[str]], named: str | None = None, *, few: bool = False) -> Scheme:
    """The scheme of a file's tags: the one that is named, else the one that its tags are of.

    Args:
        sentences: the tags of each sentence.
        few: a single plain tag is enough, as of data whose labels are known.

    Raises:
        ValueError: the name is not one of `SCHEMES`.
        UnclearTags: the tags are not of the named scheme, or of none, or of several.
    """
    if named is not None and named not in SCHEMES:
        raise ValueError(f"tag_scheme (--tag-scheme): must be one of {', '.join(SCHEMES)}; got {named!r}")
    # In the order of the file, so that the first tag that does not fit is named.
    found = list(dict.fromkeys(tag for tags in sentences for tag in tags))
    if named == "plain":
        return Scheme("plain", {})
    if named == "IO":
        odd = next((tag for tag in found if len(tag.split()) != 1), None)
        if odd is not None:
            raise UnclearTags(odd, f"expected a tag without blanks; got {odd!r}")
        return Scheme("IO", {tag: ("O", "") if tag in _OUTSIDE else ("I", tag) for tag in found})
    parts = _parts(found)
    if parts is None:
        if named is not None or any(tag in _OUTSIDE for tag in found) or (len(found) < 2 and not few):
            raise UnclearTags(*_unclear(found, named))
        return Scheme("plain", {})
    letters = {letter for letter, _ in parts.values()} - {"O"}
    names = [named] if named is not None else list(_LETTERS)
    name = next((name for name in names if letters <= set(_LETTERS[name])), None)
    if name is None:
        allowed = (
            f"of {named} ({', '.join(_LETTERS[named])} and O)" if named else f"of one scheme of {', '.join(SCHEMES)}"
        )
        usual = "BI" if named is None else _LETTERS[named]
        odd = next(tag for tag in found if parts[tag][0] not in (*usual, "O"))
        raise UnclearTags(odd, f"expected tags {allowed}; got {odd!r} among the letters {', '.join(sorted(letters))}")
    if name == "BIO" and named is None and _is_iob1(sentences, parts):
        name = "IOB1"
    return Scheme(name, parts)


def _parts(found: Sequence[str]) -> dict[str, tuple[str, str]] | None:
    """Tag -> (letter, type), if all tags are written in one of the usual ways."""
    inside = [tag for tag in found if tag not in _OUTSIDE]
    ways: tuple[Callable[[str], tuple[str, str] | None], ...] = (_in_front, _behind, _alone)
    for way in ways:
        parts = {tag: way(tag) for tag in inside}
        if all(part is not None for part in parts.values()):
            if way is _alone and inside and "B" not in inside:
                continue
            if not inside and "0" in found:
                continue
            return {tag: parts.get(tag) or ("O", "") for tag in found}
    return None


def _in_front(tag: str) -> tuple[str, str] | None:
    match = _IN_FRONT.fullmatch(tag)
    return (match[1].upper(), match[2]) if match else None


def _behind(tag: str) -> tuple[str, str] | None:
    match = _BEHIND.fullmatch(tag)
    return (match[2], match[1]) if match else None


def _alone(tag: str) -> tuple[str, str] | None:
    return (tag, UNNAMED) if len(tag) == 1 and _WITHOUT_TYPE.fullmatch(tag) else None


def _unclear(found: Sequence[str], named: str | None) -> tuple[str, str]:
    odd = next((tag for tag in found if tag not in _OUTSIDE and not _in_front(tag)), found[0])
    what = f"a tag of {named}" if named is not None else "the tag O, B-x or I-x"
    plain = all(not _in_front(tag) and not _behind(tag) for tag in found) and not _WITHOUT_TYPE.fullmatch(odd)
    advice = ""
    if all(tag.isdecimal() for tag in found) and named is None:
        advice = "; label_names (--label-names) names numbers"
    elif plain and named is None:
        advice = (
            "; --tag-scheme plain (tag_scheme) reads each word's tag as its class, IO neighbours of one as an entity"
        )
    return odd, f"expected {what}; got {odd!r}{advice}"


def _is_iob1(sentences: Collection[Sequence[str]], parts: Mapping[str, tuple[str, str]]) -> bool:
    """Whether entities begin with I-x, and B-x stands where it parts neighbours alone."""
    begun = False
    for tags in sentences:
        before = ""
        for tag in tags:
            letter, kind = parts[tag]
            if letter == "B" and kind != before:
                return False
            begun = begun or (letter == "I" and kind != before)
            before = kind
    return begun


def to_entities(tags: Sequence[str], scheme: Scheme) -> tuple[list[str], list[int]]:
    """The same entities in IOB2, and where a tag does not go with the one in front of it.

    An entity that begins with another tag than its scheme has there begins all the same. Plain tags stay as they are.
    """
    if scheme.name == "plain":
        return list(tags), []
    found, wrong = [], []
    last, open_kind = "O", ""
    closes = scheme.name not in ("BIO", "IOB1", "IO")
    for index, tag in enumerate(tags):
        letter, kind = scheme.parts.get(tag) or _in_front(tag) or ("O", "")
        goes_on = letter not in _BEGINS and letter != "O" and kind == open_kind
        if letter == "O":
            found.append("O")
        else:
            found.append(("I-" if goes_on else "B-") + kind)
        stray = letter not in _BEGINS and letter != "O" and not goes_on and scheme.name not in ("IOB1", "IO")
        # Of a scheme that closes entities, one that is left open.
        left = closes and bool(open_kind) and last in ("B", *_GOES_ON) and not goes_on
        if stray or left:
            wrong.append(index)
        last = letter
        open_kind = kind if letter in ("B", *_GOES_ON) else ""
    if closes and open_kind and last in ("B", *_GOES_ON):
        wrong.append(len(tags) - 1)
    return found, wrong


def look_like_iob(tags: Collection[str]) -> bool:
    """Whether tags say where entities begin and end, at first sight: O and a letter in front of each type."""
    inside = [tag for tag in tags if tag not in _OUTSIDE]
    return bool(inside) and all(map(_in_front, inside))


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
