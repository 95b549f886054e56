"""What `ptv2-fast data` says: from a place and what the caller names to facts, and from facts to lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ptv2_fast.training.data.examples import Given
from ptv2_fast.training.data.guess import Guess, guess_task
from ptv2_fast.training.data.read import Source
from ptv2_fast.training.data.report import (
    Asked,
    Part,
    duplicates,
    label_counts,
    lengths,
    read_parts,
    shared,
    unseen_labels,
)
from ptv2_fast.training.data.source import DataSource
from ptv2_fast.training.data.write import write_examples

_SHOWN = 3  # rows, and of each kind of trouble
_LABELS = 30  # lines of labels
_WIDE = 200  # characters of a row


def facts_of_data(
    source: DataSource,
    dev: DataSource | None = None,
    *,
    task: str | None = None,
    problem_type: str | None = None,
    tokenizer: str | None = None,
    to: str | Path | None = None,
) -> dict[str, Any]:
    """What was understood of data, and what looks wrong in it.

    Args:
        source, dev: training and development data; without dev, the splits of the first are compared.
        task, problem_type: what for; guessed if None.
        tokenizer: a folder with a `tokenizer.json`, or such a file, by which lengths are counted too.
        to: a file to write the examples to, in this project's own form.

    Raises:
        FileNotFoundError, ValueError: nothing of it can be read, or it cannot be written.
    """
    count = None if tokenizer is None else _token_counter(tokenizer)
    columns: dict[str, Any] = {
        "texts": source.text_column or None,
        "label": source.label_column,
        "prompt": source.prompt_column,
        "completion": source.completion_column,
    }
    guess = None
    if task is None:
        guess = guess_task(source.path, columns, split=source.split, format=source.format)
        task, problem_type = guess.task, problem_type or guess.problem_type
    notes: list[str] = []
    parts: dict[str, Part] = {}
    for one in [source] if dev is None else [source, dev]:
        reads = Source(one.path, task, problem_type, True, one.format)
        given = Given(None, one.label_names, one.tag_scheme)
        reads.check(given)
        kind, roles, found = read_parts(Asked(reads, reads.wanted(**columns), given), one.split, notes)
        default = "data" if dev is None else ("train" if one is source else "dev")
        for name, part in found.items():
            called = default if name is None else name
            parts[f"{called} of {one.path}" if called in parts else called] = part
    facts: dict[str, Any] = {"place": source.path, "format": kind, "task": task, "problem_type": problem_type}
    facts |= {"guess": None if guess is None else _guess(guess), "columns": roles, "notes": notes}
    facts["splits"] = {name: _facts(part, count) for name, part in parts.items()}
    first, *others = parts
    facts["in_both"] = {f"{first} and {name}": shared(parts[first], parts[name]) for name in others}
    labelled = problem_type != "regression"
    facts["unseen_labels"] = unseen_labels(parts[first], [parts[name] for name in others]) if labelled else []
    if to is not None:
        facts["written"] = _written(Path(to), parts, task, problem_type)
    return facts


def _guess(guess: Guess) -> dict[str, Any]:
    return {"because": guess.because, "others": list(guess.others)}


def _facts(part: Part, count: Callable[[str], int] | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"rows": len(part.examples), "refused": len(part.refused), "empty": part.empty}
    facts["first_refused"] = part.refused[:_SHOWN]
    facts["unusable"] = part.unusable
    facts["labels"] = label_counts(part)
    numbers = [example["label"] for example in part.examples if isinstance(example.get("label"), float)]
    if numbers:
        facts["numbers"] = {"min": min(numbers), "mean": sum(numbers) / len(numbers), "max": max(numbers)}
    facts["words"] = lengths(part, lambda text: len(text.split()))
    if count is not None:
        facts["tokens"] = lengths(part, count)
    facts["duplicates"] = duplicates(part)
    facts["examples"] = part.examples[:_SHOWN]
    return facts


def _written(path: Path, parts: Mapping[str, Part], task: str, problem_type: str | None) -> str:
    if len(parts) > 1:
        raise ValueError(f"--to writes one split; choose it (--split) of {', '.join(parts)}")
    (part,) = parts.values()
    if part.unusable is not None:
        raise ValueError(f"--to writes data that can be used: {part.unusable}")
    if part.refused:
        raise ValueError(f"--to writes data that is read whole; {len(part.refused)} rows are not: {part.refused[0]}")
    write_examples(path, part.examples, task, problem_type)
    return f"{path}: {len(part.examples)} examples"


def _token_counter(name: str) -> Callable[[str], int]:
    """Tokens of a text by a tokenizer on disk, with those that begin and end it."""
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a folder with tokenizer.json, by which tokens are counted (--model)")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain exceptions
        raise ValueError(f"{path}: expected a tokenizer; {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text).ids)


def lines_of_facts(facts: Mapping[str, Any]) -> Iterator[str]:
    """Facts as text for a terminal."""
    yield f"{facts['place']}: {facts['format']}"
    problem = f", {facts['problem_type']}" if facts["problem_type"] else ""
    guess = facts["guess"]
    if guess is None:
        yield f"task      {facts['task']}{problem}"
    else:
        also = f"; could be {', '.join(guess['others'])} too" if guess["others"] else ""
        yield f"task      {facts['task']}{problem}: guessed by {guess['because']}{also} (--task, --problem-type)"
    roles = (role if role == column else f"{role} = {column!r}" for role, column in facts["columns"].items())
    yield f"columns   {', '.join(roles)}"
    for name, split in facts["splits"].items():
        yield from _split_lines(name, split)
    for names, both in facts["in_both"].items():
        if both["rows"]:
            yield f"warning   {both['rows']} rows are in {names}: {'; '.join(both['first'])}"
    if facts["unseen_labels"]:
        yield f"warning   labels that training data does not have: {', '.join(facts['unseen_labels'])}"
    for note in facts["notes"]:
        yield f"note      {note}"
    if "written" in facts:
        yield f"written   {facts['written']}"


def _split_lines(name: str, split: Mapping[str, Any]) -> Iterator[str]:
    yield f"{name}: {split['rows']} rows"
    for unit in ("words", "tokens"):
        if split.get(unit):
            found = split[unit]
            shown = ", ".join(f"{key} {found[key]}" for key in ("min", "median", "p95", "max"))
            yield f"  {unit:<8}{shown} ({found['longest']})"
    if "numbers" in split:
        yield "  numbers " + ", ".join(f"{key} {value:g}" for key, value in split["numbers"].items())
    for label, count in islice(split["labels"].items(), _LABELS):
        yield f"  label   {label}: {count}"
    if len(split["labels"]) > _LABELS:
        yield f"  label   and {len(split['labels']) - _LABELS} others"
    for example in split["examples"]:
        text = json.dumps(example, ensure_ascii=False)
        yield f"  row     {text[:_WIDE]}{'...' if len(text) > _WIDE else ''}"
    if split["refused"]:
        empty = f", {split['empty']} of them without text" if split["empty"] else ""
        yield f"warning   {split['refused']} rows cannot be used{empty}:"
        yield from (f"          {message}" for message in split["first_refused"])
    if split["unusable"] is not None:
        yield "warning   no row can be used, as labels stand:"
        yield f"          {split['unusable']}"
    again = split["duplicates"]
    if again["rows"]:
        yield f"warning   {again['rows']} rows repeat others: {'; '.join(again['first'])}"
    if again["differing"]:
        yield f"warning   {again['differing']} of these have another label: {'; '.join(again['first_differing'])}"
