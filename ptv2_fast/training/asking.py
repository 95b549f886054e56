"""What `ptv2-fast predict` does with its flags: from a folder and what is asked to records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.training.flags import source_of
from ptv2_fast.training.loading import LoadedAdapter, load_all, load_trained
from ptv2_fast.training.records import examples_of, records_of
from ptv2_fast.training.requests import read_requests, typed_requests
from ptv2_fast.training.together import answers_of


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        file: a data file; None reads `texts`.
        texts: lines.
        where: they come from.
        context: what questions are about that are given as texts.
        flags: the command's others, by their names.
    """

    file: str | None
    texts: Iterable[str]
    where: str
    context: str | None
    flags: Mapping[str, Any]

    def loading(self) -> dict[str, Any]:
        """How adapters are loaded."""
        return {name: self.flags[name] for name in ("model", "max_length", "head")}

    def options(self, members: Mapping[str, LoadedAdapter], folder: str) -> dict[str, Any]:
        """Keyword arguments of `records_of` and `answers_of`, once the flags are ones that an adapter's task reads.

        Raises:
            ValueError: one is not.
        """
        tasks = list(dict.fromkeys(member.codec.task_type for member in members.values()))
        found = ", ".join(tasks)
        if self.context is not None and ("QUESTION_ANS" not in tasks or self.file is not None):
            raise ValueError(
                "--context is read for questions that are given as texts; got it with another task or --file"
            )
        most, candidates, top = (self.flags[name] for name in ("max_new_tokens", "candidates", "top"))
        if most is not None and "CAUSAL_LM" not in tasks:
            raise ValueError(f"--max-new-tokens is read for CAUSAL_LM alone; {folder} is for {found}")
        if (candidates is not None or top is not None) and "SENTENCE_RETRIEVAL" not in tasks:
            raise ValueError(f"--candidates and --top are read for SENTENCE_RETRIEVAL alone; {folder} is for {found}")
        if top is not None and candidates is None:
            raise ValueError("--top is read with --candidates alone")
        against = None
        if candidates is not None:
            ranking = next(member for member in members.values() if member.codec.task_type == "SENTENCE_RETRIEVAL")
            against = [example["text"] for example in ranking.read(source_of(candidates, {}), labelled=False)]
        options = {"batch_size": self.flags["batch_size"], "max_new_tokens": most or 64}
        return {**options, "candidates": against, "top": top or 10}


def records(folder: str, adapter: str | None, asked: Question) -> Iterator[dict[str, Any]]:
    """The records of one adapter.

    Args:
        adapter: which one, where the folder holds several.

    Raises:
        FileNotFoundError, ValueError: the folder, a flag or an example is not as expected.
    """
    loaded = load_trained(folder, adapter=adapter, **asked.loading())
    options = asked.options({loaded.name: loaded}, folder if adapter is None else str(Path(folder, adapter)))
    if asked.file is not None:
        examples = loaded.read(source_of(asked.file, asked.flags, loaded.columns), labelled=False)
    else:
        examples = examples_of(asked.texts, loaded.codec.task_type, where=asked.where, context=asked.context)
    loaded.check_parts(asked.file or "text", examples)
    return records_of(loaded, examples, **options)


def records_together(folder: str, adapters: Sequence[str], asked: Question) -> Iterator[dict[str, Any]]:
    """The records of several adapters of a folder, as `answers_of` gives them.

    Raises:
        FileNotFoundError, ValueError: as `records`.
    """
    members = load_all(folder, adapters=adapters, **asked.loading())
    options = asked.options(members, folder)
    if asked.file is not None:
        requests = read_requests(members, asked.file, asked.flags)
    else:
        requests = typed_requests(members, asked.texts, where=asked.where, context=asked.context)
    return answers_of(members, requests, **options)
