"""CSV and TSV: which row is the header, what the columns are called without one, and how cells are quoted.

What cannot be told from the file is refused, with the option that decides it: columns of a file without a header are
named by their numbers, as in `--text-column 2 --label-column 1`.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from ptv2_fast.training.data.rows import Row, lines_of, read_text

Line: TypeAlias = tuple[str, list[str]]  # where it stands, its cells

# A first row that holds one of these (any case) names its columns.
HEADER_NAMES = frozenset(
    "text sentence text_pair text_a text_b sentence1 sentence2 premise hypothesis question"
    " question1 question2 passage context review comment content label labels class category"
    " sentiment target prompt completion".split()
)
_LABEL_NAMES = frozenset("label labels class category sentiment target completion".split())
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")
# More words than a label has.
TEXT_WORDS = 3
# Most characters of a cell: what a C long holds everywhere. Python's own limit, 131072, is less than a long document.
_LONGEST_CELL = 2**31 - 1


def delimited_rows(
    path: Path,
    named: Sequence[str] = (),
    *,
    separator: str,
    task: str = "SEQ_CLS",
    headers: Collection[str] = (),
    labelled: bool = True,
    notes: list[str],
) -> Iterator[Row]:
    """Rows of a CSV (quotes as in RFC 4180) or TSV (quoted only where its header is).

    The first row is a header when it holds a name of `HEADER_NAMES` or `headers` that is no value of its column, or
    when the caller named columns; named by numbers (from 1) that the first row does not hold, there is no header. Else
    a file of two columns is `sentence<TAB>label` (SEQ_CLS), and one of a single column `text`.

    Args:
        named: the columns that the caller asks for.
        separator: between cells, "," or a tab.
        task, labelled: what for, as in `read_examples`.
        headers: usual names of the task's own columns.
        notes: is given a line for whatever is left out.

    Raises:
        ValueError: rows differ in length, the quoting is broken, or header and columns cannot be told.
    """
    lines = list(_lines(path, separator, notes))
    if not lines:
        raise ValueError(f"{path}, line 1: expected at least one example; found none")
    where, first = lines[0]
    _refuse_later_header(lines)
    known = HEADER_NAMES.union(headers)
    numbers = _numbered(where, first, named)
    own = _header(lines, named, known) if numbers is None else None
    header = numbers or own
    if header is None:
        if len(first) > 1 and task not in ("SEQ_CLS", "CAUSAL_LM"):
            raise ValueError(f"{where}: expected a header row with the columns of {task}; got {first}")
        _refuse_likely_header(lines)
        header = _usual_names(lines, task, labelled, known)
        if not labelled and len(header) == 2:
            notes.append(f"{where}: no header; the second of two columns is taken for the label and left out")
    body = lines if own is None else lines[1:]
    for where, cells in body:
        if len(cells) != len(header):
            is_open = separator == "\t" and any(cell.startswith('"') and cell.count('"') % 2 for cell in cells)
            more = "; a quote is open, and cells of a .tsv are quoted only where its header is" if is_open else ""
            raise ValueError(f"{where}: expected {len(header)} columns {header}; got {len(cells)}: {cells}{more}")
        if own is not None and cells == first:
            raise ValueError(f"{where}: repeats the header {first}; expected an example")
        yield Row(where, dict(zip(header, cells, strict=True)))


def _numbered(where: str, first: list[str], named: Sequence[str]) -> list[str] | None:
    """The columns' numbers where the caller names columns by them."""
    if not named or not all(name.isdecimal() for name in named) or set(named) <= {cell.strip() for cell in first}:
        return None
    cells = [cell.strip() for cell in first]
    if all(map(_IDENTIFIER.fullmatch, cells)) and any(cell.lower() in HEADER_NAMES for cell in cells):
        raise ValueError(f"{where}: expected no header where columns go by number, {list(named)}; got {first}")
    numbers = [str(number) for number in range(1, len(first) + 1)]
    unknown = [name for name in named if name not in numbers]
    if unknown:
        raise ValueError(f"{where}: expected columns numbered 1 to {len(first)}; got {unknown}")
    return numbers


def _header(lines: Sequence[Line], named: Sequence[str], known: Collection[str]) -> list[str] | None:
    where, first = lines[0]
    if not named and not _holds_a_name(lines, known):
        return None
    # A column without a name goes by its number.
    header = [_column_name(cell.strip(), named, known) or str(number) for number, cell in enumerate(first, start=1)]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise ValueError(f"{where}: column names must differ; repeated: {repeated}")
    missing = [name for name in named if name not in header]
    if missing:
        raise ValueError(f"{where}: expected the columns {missing}; got {header}")
    return header


def _column_name(cell: str, named: Sequence[str], known: Collection[str]) -> str:
    return cell.lower() if cell not in named and cell.lower() in known else cell


def _holds_a_name(lines: Sequence[Line], known: Collection[str]) -> bool:
    """Whether the first row has a usual column name that is not also a value of its column ("review", a class)."""
    first = lines[0][1]
    named = [index for index, cell in enumerate(first) if cell.strip().lower() in known]
    others = [cells for _, cells in lines[1:] if cells != first]
    return any(all(len(cells) <= index or cells[index] != first[index] for cells in others) for index in named)


def _refuse_later_header(lines: Sequence[Line]) -> None:
    """Refuses a header below the first line: what stands above it is no example, or two tables are joined."""
    first = lines[0][1]
    for where, cells in lines[1:]:
        names = {cell.strip().lower() for cell in cells}
        if cells != first and len(names & _LABEL_NAMES) > 0 and len(names & HEADER_NAMES) > 1:
            if all(_IDENTIFIER.fullmatch(name) for name in names):
                raise ValueError(f"{where}: {cells} looks like a header; it must be the first line, not {first}")


def _refuse_likely_header(lines: Sequence[Line]) -> None:
    """Refuses `comment_text<TAB>stars` as an example: a first row that is of another kind than the rest."""
    where, first = lines[0]
    if len(first) > 2:
        raise ValueError(
            f"{where}: expected a header row or sentence<separator>label; got {len(first)} columns without a known"
            f" name: {first}; name them by --text-column and --label-column (text_column, label_column), by their"
            " numbers if there is no header"
        )
    rest = [cells for _, cells in lines[1:] if len(cells) == len(first)]
    columns = [[cells[index].strip() for cells in rest] for index in range(len(first))]
    if rest and _unlike([cell.strip() for cell in first], columns):
        raise ValueError(
            f"{where}: {first} looks like a header with unknown names; name the columns by --text-column and"
            " --label-column (text_column, label_column), by their numbers (--text-column 1) if it is an example"
        )


def _unlike(first: list[str], columns: list[list[str]]) -> bool:
    pairs = list(zip(first, columns, strict=True))
    if any(not _NUMBER.fullmatch(cell) and all(map(_NUMBER.fullmatch, column)) for cell, column in pairs):
        return True
    if len(first) == 2:
        # A class of one example, where every other class has several.
        counts = Counter(columns[1])
        if first[1] not in counts and min(counts.values()) > 1:
            return True
    named = all(_IDENTIFIER.fullmatch(cell) for cell in first) and not any(cell in column for cell, column in pairs)
    return named and any(all(" " in cell for cell in column) for column in columns)


def _usual_names(lines: Sequence[Line], task: str, labelled: bool, known: Collection[str]) -> list[str]:
    where, first = lines[0]
    if len(first) == 1:
        _refuse_other_separator(lines, known)
        return ["text"]
    if task == "CAUSAL_LM":
        raise ValueError(
            f"{where}: two columns without a header; name them by their numbers: --text-column 1, or"
            " --prompt-column 1 --completion-column 2 (text_column, prompt_column, completion_column)"
        )
    left, right = ([cells[index] for _, cells in lines if len(cells) == 2] for index in range(2))
    differing, words = [len(set(left)), len(set(right))], [_words(left), _words(right)]
    swapped = (differing[1], words[1]) > (differing[0], words[0]) if differing[1] >= differing[0] else False
    if swapped or (not labelled and max(map(_words, ([cell] for cell in right))) >= TEXT_WORDS):
        raise ValueError(
            f"{where}: two columns without a header, of {differing[0]} and {differing[1]} values, and the second looks"
            " like text; name them by their numbers, as in --text-column 2 --label-column 1 (text_column, label_column)"
        )
    return ["sentence", "label"]


def _refuse_other_separator(lines: Sequence[Line], known: Collection[str]) -> None:
    """Refuses a table that another sign separates, which would be read as one text a line."""
    where, first = lines[0]
    for sign in ";\t|,":
        parts = [part.strip().strip('"').lower() for part in first[0].split(sign)]
        counts = {cells[0].count(sign) for _, cells in lines if len(cells) == 1}
        alike = sign != "," and len(lines) > 1 and counts == {len(parts) - 1}
        if len(parts) > 1 and (alike or any(part in known for part in parts)):
            raise ValueError(
                f"{where}: {first[0]!r} looks like {len(parts)} columns between {sign!r}; a .csv has commas, a .tsv"
                " tabs (--text-column 1 reads each line as one text)"
            )


def _words(cells: Sequence[str]) -> int:
    return sum(len(cell.split()) for cell in cells)


def _lines(path: Path, separator: str, notes: list[str]) -> Iterator[Line]:
    """Rows that are not blank; those of empty cells are counted in a note."""
    text = read_text(path)
    empty = 0
    quoted = _is_quoted(text, separator)
    for where, cells in _quoted(path, text, separator, notes) if quoted else _plain(path, text, notes):
        if any(cell.strip() for cell in cells):
            yield where, cells
        else:
            empty += len(cells) > 1
    if empty:
        notes.append(f"{path}: {empty} rows of empty cells are left out")


def _is_quoted(text: str, separator: str) -> bool:
    """Whether cells may stand in quotes: in a CSV, and in a TSV whose header does."""
    cells = [cell.strip() for cell in text.lstrip("\r\n").split("\n", 1)[0].split(separator)]
    return separator == "," or any(_wrapped(cell) and cell[1:-1].strip().lower() in HEADER_NAMES for cell in cells)


def _wrapped(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def _plain(path: Path, text: str, notes: list[str]) -> Iterator[Line]:
    wrapped = []
    for number, line in lines_of(path, text):
        if line.strip(" \r"):
            where, cells = f"{path}, line {number}", line.split("\t")
            wrapped += [where for cell in cells if _wrapped(cell)]
            yield where, cells
    if wrapped:
        notes.append(f"{wrapped[0]}: {len(wrapped)} cells stand in quotes, which are kept: the header has none")


def _quoted(path: Path, text: str, separator: str, notes: list[str]) -> Iterator[Line]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    wrapped: list[str] = []
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        # The limit is the whole program's, which has its own again behind each row.
        limit = csv.field_size_limit(_LONGEST_CELL)
        try:
            cells = next(reader)
        except StopIteration:
            if wrapped:
                kept = f"{len(wrapped)} cells stand in quotes, which are kept: a blank is in front of them"
                notes.append(f"{wrapped[0]}: {kept}")
            return
        except csv.Error as error:
            kind = "comma" if separator == "," else "tab"
            raise ValueError(f"{where}: expected {kind}-separated values; {error}") from error
        finally:
            csv.field_size_limit(limit)
        wrapped += [where for cell in cells if cell.startswith(" ") and _wrapped(cell.strip())]
        if cells:
            yield where, cells
