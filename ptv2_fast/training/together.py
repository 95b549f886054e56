"""Answers of all adapters of a folder, in shared batches: one pass of the backbone for rows of any of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ptv2_fast import PTuningV2Model
from ptv2_fast.prompts.placement import is_inline
from ptv2_fast.training.batches import PadCollator
from ptv2_fast.training.chat import prompt_inputs
from ptv2_fast.training.decoding import Asked
from ptv2_fast.training.lines import lines_of as lines_of
from ptv2_fast.training.loading import LoadedAdapter
from ptv2_fast.training.records import records_of
from ptv2_fast.training.requests import Requests
from ptv2_fast.training.retrieval import text_in, vector_records
from ptv2_fast.training.texts import prompt_of

# What `generate` is given of a row.
_PROMPT = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class _Item:
    """One row of a batch: a feature of an adapter's, by its number."""

    name: str
    index: int
    inputs: Mapping[str, Any]
    writes: bool

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])


def answers_of(
    members: Mapping[str, LoadedAdapter],
    requests: Requests,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    candidates: Sequence[str] | None = None,
    top: int = 10,
) -> Iterator[dict[str, Any]]:
    """One record for each row, in order: the row, and under each adapter's name the record that it gives alone.

    Rows of all adapters stand in the same batches. A batch with rows that write text is one `generate`, whose first
    pass reads the others' too; any other batch is one forward. Windows of long contexts are rows like others, and so
    are texts to be embedded and the queries of a ranking. In passes of their own, with the same result, run: the
    choices of MULTIPLE_CHOICE, which are several rows that belong together; the candidates of a ranking; adapters with
    several heads, and those whose head is a copy of the base's own; and where the tokenizer gives more than ids and a
    mask, the rows that write.

    Args:
        members: what `load_all` gives.
        batch_size: rows of a batch, of all adapters together.
        max_new_tokens, candidates, top: as in `records_of`.

    Raises:
        ValueError: a row is unusable; the message names the adapter.
    """
    asked = Asked(batch_size, max_new_tokens, candidates, top)
    records: dict[str, dict[int, dict[str, Any]]] = {}
    shared = {name: member for name, member in members.items() if _shares(member)}
    features = {name: _features(members[name], name, list(requests.examples[name].values())) for name in shared}
    results = _run(shared, features, asked)
    for name, member in members.items():
        rows, examples = list(requests.examples[name]), list(requests.examples[name].values())
        if not examples:
            records[name] = {}
            continue
        with _active(member):
            made = (
                _records(member, examples, features[name], results[name], asked)
                if name in shared
                else list(records_of(member, examples, **vars(asked)))
            )
        records[name] = dict(zip(rows, made, strict=True))
    for index, row in enumerate(requests.rows):
        yield {**row, **{name: records[name][index] for name in members if index in records[name]}}


def _shares(member: LoadedAdapter) -> bool:
    """Whether an adapter's rows may stand beside those of others."""
    adapter, row = member.model.adapters[member.name], member.codec.row
    if len(adapter.base_heads) or len(adapter.heads) > 1 or adapter.config.task_type != member.codec.task_type:
        return False
    if is_inline(adapter.config, member.model._family):
        return False
    return not row.in_groups or row.pools_itself


@contextmanager
def _active(member: LoadedAdapter) -> Iterator[None]:
    """The adapter is the active one of the model that it shares."""
    before = member.model.active_adapter
    member.chosen()
    try:
        yield
    finally:
        member.model.active_adapter = before


def _features(member: LoadedAdapter, name: str, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Features of an adapter's examples as it has them alone."""
    codec = member.codec
    try:
        if codec.row.gives == "text":
            chats = bool(member.settings.get("chat"))
            encoded = [prompt_inputs(prompt_of(example), codec.tokenizer, chats=chats) for example in examples]
            features = [{key: encoding[key] for key in _PROMPT} for encoding in encoded]
        else:
            features = codec.encode(examples)
        if not all(feature["input_ids"] for feature in features):
            raise ValueError("expected texts with tokens; got one without")
    except ValueError as error:
        raise ValueError(f"adapter {name!r}: {error}") from error
    return features


def _run(
    members: Mapping[str, LoadedAdapter], features: Mapping[str, Sequence[Mapping[str, Any]]], asked: Asked
) -> dict[str, list[Any]]:
    """What the model gives for each feature: the tensor that its task reads, on the CPU; of prompts the new tokens."""
    items = []
    for name, member in members.items():
        names, writes = member.codec.tokenizer.model_input_names, member.codec.row.gives == "text"
        for index, feature in enumerate(features[name]):
            inputs = {key: feature[key] for key in names if key in feature}
            items.append(_Item(name, index, inputs, writes))
    more = any(set(item.inputs) - set(_PROMPT) for item in items if not item.writes)
    groups = [[item for item in items if item.writes == writes] for writes in (True, False)] if more else [items]
    results: dict[str, list[Any]] = {name: [None] * len(features[name]) for name in members}
    for group in groups:
        # Longest first, so that little is padded.
        group.sort(key=lambda item: -item.length)
        for begin in range(0, len(group), asked.batch_size):
            batch = group[begin : begin + asked.batch_size]
            written = any(item.writes for item in batch)
            found = _written(members, batch, asked) if written else _read(members, batch)
            for item, result in zip(batch, found, strict=True):
                results[item.name][item.index] = result
    return results


@torch.no_grad()
def _read(members: Mapping[str, LoadedAdapter], batch: Sequence[_Item]) -> list[Tensor]:
    """One forward: each row's tensor, of its own tokens."""
    member = members[batch[0].name]
    inputs = _padded(member, batch, "right")
    output = member.model(**inputs, adapter_names=[members[item.name].name for item in batch])
    if "start_logits" in output:
        rows = torch.stack([output.start_logits, output.end_logits], dim=-1)
    else:
        rows = output.embeddings if "embeddings" in output else output.logits
    return [row.float().cpu() for row in rows]


def _written(members: Mapping[str, LoadedAdapter], batch: Sequence[_Item], asked: Asked) -> list[Tensor]:
    """One `generate`: of rows that write the new tokens (L,), of the others the tensor of their own tokens."""
    member = members[batch[0].name]
    tokenizer, model = member.codec.tokenizer, member.model
    inputs = _padded(member, batch, "left")
    width = inputs["input_ids"].shape[1]
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = {"max_new_tokens": asked.max_new_tokens, "do_sample": False, "pad_token_id": filler}
    output = model.generate(**inputs, adapter_names=[members[item.name].name for item in batch], **options)
    if isinstance(output, Tensor):
        sequences, results = output, [None] * len(batch)
    else:
        sequences, results = output.sequences, list(output.logits)
    ends = _ends(model)
    texts = iter(_cut(sequence[width:].cpu(), ends) for sequence in sequences)
    found = []
    for item, result in zip(batch, results, strict=True):
        if result is None:
            found.append(next(texts))
        else:
            per_token = result.dim() == 2
            found.append((result[-item.length :] if per_token else result).float().cpu())
    return found


def _padded(member: LoadedAdapter, batch: Sequence[_Item], side: str) -> dict[str, Tensor]:
    collator = PadCollator(member.codec.tokenizer, padding_side=side)
    tensors = collator([item.inputs for item in batch])
    return {name: tensor.to(member.model.device) for name, tensor in tensors.items()}


def _ends(model: PTuningV2Model) -> list[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())


def _cut(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    """A text up to its end; behind that stands what fills a batch."""
    found = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype)).nonzero()
    return tokens if not len(found) else tokens[: int(found[0]) + 1]


def _records(
    member: LoadedAdapter,
    examples: list[dict[str, Any]],
    features: Sequence[Mapping[str, Any]],
    results: Sequence[Tensor],
    asked: Asked,
) -> list[dict[str, Any]]:
    """An adapter's records from what the shared batches gave."""
    codec, row, task = member.codec, member.codec.row, member.codec.task
    if row.gives == "text":
        texts = [codec.tokenizer.decode(result, skip_special_tokens=True) for result in results]
        prompts = [prompt_of(example) for example in examples]
        return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    if row.pools_itself:
        return list(
            vector_records(member, [text_in(example) for example in examples], torch.stack(list(results)), asked)
        )
    assert task.read is not None and task.decode is not None and task.record is not None
    read = [task.read(_output(result, row.gives))[0] for result in results]
    predictions = task.decode(read, features, examples, codec)
    return [task.record(example, found) for example, found in zip(examples, predictions, strict=True)]


def _output(result: Tensor, gives: str) -> Any:
    """One row's tensor as the output of a batch of one."""
    if gives == "span":
        starts, ends = result[None].unbind(-1)
        return SimpleNamespace(start_logits=starts, end_logits=ends)
    return SimpleNamespace(logits=result[None])
