"""What people type and what they read: lines as examples, predictions as records, records as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ptv2_fast.training.chat import prompt_inputs
from ptv2_fast.training.codec import Loaded
from ptv2_fast.training.data.examples import check_text, json_object
from ptv2_fast.training.data.words import places_of, words_of
from ptv2_fast.training.decoding import Asked, Prediction


def typed_text(line: str, where: str, number: int, context: str | None) -> dict[str, Any]:
    """A line is a text."""
    return {"text": line.strip()}


def typed_sentence(line: str, where: str, number: int, context: str | None) -> dict[str, Any]:
    """A line is a sentence."""
    return {"tokens": words_of(line), "text": line.rstrip("\r\n"), "places": places_of(line)}


def typed_prompt(line: str, where: str, number: int, context: str | None) -> dict[str, Any]:
    """A line is what the model goes on from."""
    return {"prompt": line.rstrip("\r\n")}


def typed_question(line: str, where: str, number: int, context: str | None) -> dict[str, Any]:
    """A line is a question about `context`; without one, a JSON object with "question" and "context"."""
    if context is not None:
        if not check_text("--context", context).strip():
            raise ValueError(f"--context (context) must be the text that the questions are about; got {context!r}")
        return {"id": str(number), "question": line.strip(), "context": context}
    values = json_object(line)
    if values is None or not all(isinstance(values.get(k), str) for k in ("question", "context")):
        raise ValueError(f"{where}: expected a context, or a JSON object with 'question' and 'context'")
    for key in ("question", "context"):
        if not check_text(where, values[key]).strip():
            raise ValueError(f"{where}: expected text in {key!r}; got {values[key]!r}")
    return {"id": str(number), "question": values["question"], "context": values["context"]}


def class_record(example: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
    """{"text", "text_pair" (pairs only), "label", "score", "scores" of all classes}."""
    scores = {name: round(score, 6) for name, score in (prediction.scores or {}).items()}
    return {**texts_in(example), "label": prediction.value, "score": round(prediction.score, 6), "scores": scores}


def tags_record(example: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
    """{"text", "tokens", "tags", "entities": [{"text", "label", "start", "end", "score"}, ...]}.

    Start and end are characters of the text, which is what was typed, or the words of a file between blanks; the score
    is the probability of the least certain tag.
    """
    tokens, tags = list(example["tokens"]), list(prediction.value)
    text = example["text"] if "places" in example else " ".join(tokens)
    places = example.get("places") or _places_between_blanks(tokens)
    scores = prediction.scores or {}
    entities = []
    for entity in entities_of(tokens, tags):
        words = range(entity["start"], entity["end"])
        start, end = places[words[0]][0], places[words[-1]][1]
        score = min((scores[word] for word in words if word in scores), default=0.0)
        entities.append(
            {"text": text[start:end], "label": entity["type"], "start": start, "end": end, "score": round(score, 6)}
        )
    return {"text": text, "tokens": tokens, "tags": tags, "entities": entities}


def _places_between_blanks(tokens: Sequence[str]) -> list[tuple[int, int]]:
    places, start = [], 0
    for token in tokens:
        places.append((start, start + len(token)))
        start += len(token) + 1
    return places


def answer_record(example: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
    """{"id", "question", "answer", "start", "end", "score"}: characters of the context, null without an answer."""
    start, end = prediction.place or (None, None)
    answer = {"answer": prediction.value, "start": start, "end": end, "score": round(prediction.score, 6)}
    return {"id": example["id"], "question": example["question"], **answer}


def text_records(loaded: Loaded, examples: Sequence[Mapping[str, Any]], asked: Asked) -> Iterator[dict[str, Any]]:
    """{"prompt", "text"} of each prompt, continued greedily."""
    for example in examples:
        prompt = prompt_of(example)
        yield {"prompt": prompt, "text": _continued(loaded, prompt, asked.max_new_tokens)}


def prompt_of(example: Mapping[str, Any]) -> Any:
    """What the model goes on from: a text, or messages."""
    return example.get("prompt", example.get("text"))


def _continued(loaded: Loaded, prompt: Any, most: int) -> str:
    """The prompt's greedy continuation alone."""
    tokenizer, model = loaded.codec.tokenizer, loaded.model
    chats = bool(loaded.settings.get("chat"))
    inputs = prompt_inputs(prompt, tokenizer, chats=chats, return_tensors="pt").to(model.device)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    output = model.generate(**options, max_new_tokens=most, do_sample=False, pad_token_id=filler)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


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


def class_line(record: Mapping[str, Any]) -> str:
    """The class, its score and the text, between tabs."""
    return "\t".join((record["label"], f"{record['score']:.4f}", *texts_in(record).values()))


def tags_line(record: Mapping[str, Any]) -> str:
    """One `token<TAB>tag` a line and a blank line."""
    return "\n".join(f"{token}\t{tag}" for token, tag in zip(record["tokens"], record["tags"], strict=True)) + "\n"


def answer_line(record: Mapping[str, Any]) -> str:
    """The answer, its score and the question, between tabs."""
    return f"{record['answer']}\t{record['score']:.4f}\t{record['question']}"


def text_line(record: Mapping[str, Any]) -> str:
    """The prompt and what follows it; of messages the answer alone."""
    prompt, text = record["prompt"], record["text"]
    return str(prompt + text if isinstance(prompt, str) else text)


def texts_in(parts: Mapping[str, Any]) -> dict[str, str]:
    """The text, or the pair of texts, of an example or a record."""
    return {key: parts[key] for key in ("text", "text_pair") if key in parts}
