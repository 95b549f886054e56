"""What `ptv2-fast predict` does with its flags: from a folder and what is asked to records.

Everything is read and checked before torch is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.training.devices import device_of
from ptv2_fast.training.flags import source_of
from ptv2_fast.training.plans import Reader, plan_of, plans_of
from ptv2_fast.training.requests import read_requests, typed_requests
from ptv2_fast.training.shell import quiet
from ptv2_fast.training.typed import examples_of


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

    def options(self, members: Mapping[str, Reader], folder: str) -> dict[str, Any]:
        """Keyword arguments of `records_of` and `answers_of`, once the flags are ones that an adapter's task reads.

        Raises:
            ValueError: one is not.
        """
        tasks = list(dict.fromkeys(member.task_type for member in members.values()))
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
            ranking = next(member for member in members.values() if member.task_type == "SENTENCE_RETRIEVAL")
            against = [example["text"] for example in ranking.read(source_of(candidates, {}), labelled=False)]
        options = {"batch_size": self.flags["batch_size"], "max_new_tokens": most or 64}
        return {**options, "candidates": against, "top": top or 10}


def scores_of(folder: str, adapter: str | None, data: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What `ptv2-fast eval` says of an adapter: its scores on labelled data, and of how many examples they are.

    Raises:
        FileNotFoundError, ValueError: the folder, a flag or an example is not as expected.
    """
    plan = plan_of(folder, adapter=adapter, model=flags["model"], head=flags["head"])
    # Of a copy of the base's own head the base alone may know what labels are.
    examples = None if plan.needs_base_to_read else _labelled(plan.reader, data, flags)
    quiet()
    from ptv2_fast.training.loading import load_plan
    from ptv2_fast.training.predict import evaluate

    loaded = load_plan(plan, flags["max_length"], device_of(flags["device"]))
    if examples is None:
        examples = _labelled(loaded.reader, data, flags)
    features = loaded.codec.encode(examples)
    options: dict[str, Any] = {"features": features, "batch_size": flags["batch_size"], "head": flags["head"]}
    return {**evaluate(loaded.model, loaded.codec, examples, **options), "examples": len(examples)}


def _labelled(reader: Reader, data: str, flags: Mapping[str, Any]) -> list[dict[str, Any]]:
    examples = reader.read(source_of(data, flags, reader.columns))
    reader.check_parts(data, examples)
    return examples


def records(folder: str, adapter: str | None, asked: Question) -> Iterator[dict[str, Any]]:
    """The records of one adapter.

    Args:
        adapter: which one, where the folder holds several.

    Raises:
        FileNotFoundError, ValueError: the folder, a flag or an example is not as expected.
    """
    plan = plan_of(folder, adapter=adapter, model=asked.flags["model"], head=asked.flags["head"])
    reader = plan.reader
    options = asked.options({"": reader}, folder if adapter is None else str(Path(folder, adapter)))
    if asked.file is not None:
        examples = reader.read(source_of(asked.file, asked.flags, reader.columns), labelled=False)
    else:
        examples = examples_of(asked.texts, plan.task_type, where=asked.where, context=asked.context)
    reader.check_parts(asked.file or "text", examples)
    quiet()
    from ptv2_fast.training.loading import load_plan
    from ptv2_fast.training.records import records_of

    loaded = load_plan(plan, asked.flags["max_length"], device_of(asked.flags["device"]))
    return records_of(loaded, examples, **options)


def records_together(folder: str, adapters: Sequence[str], asked: Question) -> Iterator[dict[str, Any]]:
    """The records of several adapters of a folder, as `answers_of` gives them.

    Raises:
        FileNotFoundError, ValueError: as `records`.
    """
    plans = plans_of(folder, adapters=adapters, model=asked.flags["model"], head=asked.flags["head"])
    readers = {name: plan.reader for name, plan in plans.items()}
    options = asked.options(readers, folder)
    if asked.file is not None:
        requests = read_requests(readers, asked.file, asked.flags)
    else:
        requests = typed_requests(readers, asked.texts, where=asked.where, context=asked.context)
    quiet()
    from ptv2_fast.training.loading import load_plans
    from ptv2_fast.training.together import answers_of

    members = load_plans(plans, asked.flags["max_length"], device_of(asked.flags["device"]))
    return answers_of(members, requests, **options)
