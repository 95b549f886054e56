"""Predictions as records: from text that people type to dictionaries of plain values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ptv2_fast.training.data import check_text
from ptv2_fast.training.loading import LoadedAdapter
from ptv2_fast.training.predict import predict

# Words with inner apostrophes and hyphens, numbers with inner points and commas, other signs alone.
_WORD = re.compile(r"\w+(?:['’\-.,]\w+)*|[^\w\s]")


def words_of(text: str) -> list[str]:
    """The words and signs of a sentence, split as tagged corpora split them."""
    return _WORD.findall(text)


def examples_of(
    lines: Iterable[str], task_type: str, *, where: str = "text", context: str | None = None
) -> list[dict[str, Any]]:
    """Unlabelled examples from lines of text, blank ones left out.

    A line is a text (SEQ_CLS), a sentence (TOKEN_CLS), a prompt (CAUSAL_LM), or a question about
    `context` (QUESTION_ANS); without a context it is a JSON object with "question" and "context".

    Raises:
        ValueError: there is no line with text, or a line is not such an object.
    """
    examples: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        check_text(f"{where}, line {number}", line)
        if task_type == "SEQ_CLS":
            examples.append({"text": line.strip()})
        elif task_type == "TOKEN_CLS":
            examples.append({"tokens": words_of(line)})
        elif task_type == "CAUSAL_LM":
            examples.append({"prompt": line.rstrip("\r\n")})
        else:
            question = _question(line, f"{where}, line {number}", context)
            examples.append({"id": str(number), **question})
    if not examples:
        raise ValueError(f"{where}: expected at least one line with text; got none")
    return examples


def _question(line: str, where: str, context: str | None) -> dict[str, str]:
    if context is not None:
        if not check_text("--context", context).strip():
            raise ValueError(f"--context (context) must be the text that the questions are about; got {context!r}")
        return {"question": line.strip(), "context": context}
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(values.get(k), str) for k in ("question", "context")):
        raise ValueError(f"{where}: expected a context, or a JSON object with 'question' and 'context'")
    for key in ("question", "context"):
        if not check_text(where, values[key]).strip():
            raise ValueError(f"{where}: expected text in {key!r}; got {values[key]!r}")
    return {"question": values["question"], "context": values["context"]}


def records_of(
    loaded: LoadedAdapter,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
) -> Iterator[dict[str, Any]]:
    """One record for each example, in order.

    SEQ_CLS {"text", "label", "score"}; TOKEN_CLS {"tokens", "tags", "entities"}; QUESTION_ANS
    {"question", "answer", "score"}; CAUSAL_LM {"prompt", "text"}, continued greedily.
    """
    if loaded.codec.task_type == "CAUSAL_LM":
        for example in examples:
            prompt = example.get("prompt", example.get("text"))
            yield {"prompt": prompt, "text": _continued(loaded, prompt, max_new_tokens)}
        return
    found = predict(loaded.model, loaded.codec, examples, batch_size=batch_size, head=loaded.head)
    for example, prediction in zip(examples, found, strict=True):
        if loaded.codec.task_type == "SEQ_CLS":
            texts = {key: example[key] for key in ("text", "text_pair") if key in example}
            yield {**texts, "label": prediction.value, "score": round(prediction.score, 6)}
        elif loaded.codec.task_type == "TOKEN_CLS":
            tokens, tags = list(example["tokens"]), list(prediction.value)
            yield {"tokens": tokens, "tags": tags, "entities": entities_of(tokens, tags)}
        else:
            answer = {"answer": prediction.value, "score": round(prediction.score, 6)}
            yield {"id": example["id"], "question": example["question"], **answer}


def _continued(loaded: LoadedAdapter, prompt: str, max_new_tokens: int) -> str:
    """The prompt's greedy continuation alone."""
    tokenizer, model = loaded.codec.tokenizer, loaded.model
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    output = model.generate(**options, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=filler)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def entities_of(tokens: Sequence[str], tags: Sequence[str]) -> list[dict[str, Any]]:
    """Entities {"type", "text", "start", "end"} (words [start, end)); a stray I-x begins one."""
    entities: list[dict[str, Any]] = []
    for index, tag in enumerate(tags):
        side, _, kind = tag.partition("-")
        last = entities[-1] if entities else None
        if side == "I" and last is not None and last["end"] == index and last["type"] == kind:
            last["end"] = index + 1
        elif side in ("B", "I"):
            entities.append({"type": kind, "start": index, "end": index + 1})
    for entity in entities:
        entity["text"] = " ".join(tokens[entity["start"] : entity["end"]])
    return entities


def line_of(record: Mapping[str, Any]) -> str:
    """A record as text for a terminal: columns, or one `token<TAB>tag` a line and a blank line."""
    if "tags" in record:
        return "\n".join(f"{token}\t{tag}" for token, tag in zip(record["tokens"], record["tags"], strict=True)) + "\n"
    if "answer" in record:
        return f"{record['answer']}\t{record['score']:.4f}\t{record['question']}"
    if "label" in record:
        texts = [record[key] for key in ("text", "text_pair") if key in record]
        return "\t".join((record["label"], f"{record['score']:.4f}", *texts))
    return record["prompt"] + record["text"]
