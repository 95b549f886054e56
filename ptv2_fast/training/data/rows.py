"""Rows: what a file says of each example, and where it stands; the text of a file, plain or packed by gzip."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GZIP = b"\x1f\x8b"
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
_POINTER = "version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Row:
    """One record as the file has it; `where` names the file and the line for error messages.

    `lines` are those of the record's tokens, where each has its own.
    """

    where: str
    values: dict[str, Any]
    lines: tuple[int, ...] | None = None


def suffix_of(path: Path) -> str:
    """The suffix of a file, in lower case, without the one that says that it is packed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else "".join(suffixes[-1:])


def read_bytes(path: Path) -> bytes:
    """What a file holds; what gzip has packed is unpacked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is packed, and damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a data file; there is none")
    raw = path.read_bytes()
    if not raw.startswith(_GZIP):
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole file packed by gzip; {error}") from error


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (a leading byte-order mark is dropped); where no LF is in it, CR ends its lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, holds only white space, is not UTF-8, or is not what it was before it was copied.
    """
    raw = read_bytes(path)
    _refuse_other_encoding(path, raw)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: expected UTF-8 text; byte {error.start} of the file is"
            f" 0x{raw[error.start]:02x} ({error.reason})"
        ) from error
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise ValueError(f"{path}, line 1: expected at least one example; the file is empty")
    if text.startswith(_POINTER):
        raise ValueError(f"{path}, line 1: expected data; this is a pointer to it, which `git lfs pull` replaces")
    if "\n" not in text:
        return text.replace("\r", "\n")
    inside = text.find("\n\ufeff")
    if inside >= 0:
        line = text.count("\n", 0, inside) + 2
        raise ValueError(f"{path}, line {line}: a byte-order mark inside the file; two files seem to be joined in it")
    return text


def _refuse_other_encoding(path: Path, raw: bytes) -> None:
    for mark, name in _OTHER_MARKS:
        if raw.startswith(mark):
            raise ValueError(f"{path}, line 1: expected UTF-8 text; the file is {name} by its first bytes")
    if b"\0" in raw:
        at = raw.index(b"\0")
        line = raw.count(b"\n", 0, at) + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8 text; byte {at} of the file is NUL, as in UTF-16")


def lines_of(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """(1-based number, content) of each line; LF ends one, with CR in front of it or not, as editors count.

    Raises:
        ValueError: CR stands inside a line, where other programs end one.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if "\r" in line:
            raise ValueError(f"{path}, line {number}: a carriage return stands inside the line; end lines in one way")
        yield number, line
