"""Sentence retrieval: from files of texts that belong together to embeddings and rankings.

An example is {"query", "positive", "negative" (if the file has them)}, and a text alone {"text"} for prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptv2_fast.training.codec import Codec, Loaded
from ptv2_fast.training.data.pairs import PARTS
from ptv2_fast.training.decoding import Asked, Outputs, Rows
from ptv2_fast.training.metrics import RANKED, retrieval_scores
from ptv2_fast.training.tokens import check_fast, check_room, say_cut

if TYPE_CHECKING:  # tasks are looked up before torch is needed
    from torch import Tensor

# Rows of scores that are computed at a time.
_QUERIES = 256


def encode_pairs(rows: Rows, codec: Codec, quiet: bool) -> list[dict[str, Any]]:
    """Features of single texts, or of groups: lists of two or three lists, the query first."""
    check_fast(codec.tokenizer)
    check_room(codec.tokenizer, codec.max_length, pair=False)
    features, cut = [], 0
    for row in rows:
        texts = [row[part] for part in PARTS if part in row]
        encoding = codec.tokenizer(texts or [row["text"]], truncation=True, max_length=codec.max_length)
        cut += any(bool(one.overflowing) for one in encoding.encodings)
        names = [name for name in codec.tokenizer.model_input_names if name in encoding]
        features.append({name: encoding[name] if texts else encoding[name][0] for name in names})
    if not quiet:
        say_cut(cut, f"{len(rows)} examples", codec.max_length)
    return features


def pair_scores(outputs: Outputs, examples: Rows, codec: Codec) -> dict[str, float]:
    """How high each query ranks a positive of its own among all positives, and the mean loss of the batches."""
    import torch

    if not examples:
        raise ValueError("examples: expected at least one; got none")
    right: dict[str, set[str]] = {}
    for example in examples:
        right.setdefault(_part(example, "query"), set()).add(_part(example, "positive"))
    total = 0.0
    embeddings: dict[str, dict[str, Tensor]] = {"query": {}, "positive": {}}
    for indices, _, output in outputs:
        total += float(output.loss) * len(indices)
        for index, group in zip(indices, output.embeddings.float().cpu(), strict=True):
            for part, vector in zip(embeddings, group, strict=False):
                embeddings[part].setdefault(examples[index][part], vector)
    positives = list(embeddings["positive"])
    queries = torch.stack([embeddings["query"][query] for query in right])
    best = ranking(queries, torch.stack(list(embeddings["positive"].values())), RANKED)
    ranked = [[positives[index] for index, _ in hits] for hits in best]
    return {**retrieval_scores(ranked, list(right.values())), "loss": total / len(examples)}


def _part(example: Mapping[str, Any], part: str) -> str:
    if part not in example:
        raise ValueError(f"examples: expected {part!r} in each example; got {sorted(example)}")
    text: str = example[part]
    return text


def ranking(queries: Tensor, texts: Tensor, most: int) -> list[list[tuple[int, float]]]:
    """For each of queries (Q, D) at most so many of texts (T, D), (index, cosine), the closest first.

    Both are of length 1.
    """
    found: list[list[tuple[int, float]]] = []
    for part in queries.split(_QUERIES):
        best = (part @ texts.T).topk(min(most, len(texts)), dim=-1)
        found += [
            list(zip(i, s, strict=True)) for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    return found


def embed(model: Any, codec: Codec, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
    """Embeddings (T, D) of texts, of length 1, on the CPU.

    Args:
        model: a PTuningV2ModelForSentenceRetrieval.
        texts: at least one.
        batch_size: rows of a batch, at least 1.

    Raises:
        ValueError: there is no text, or one without tokens.
    """
    import torch

    if not texts or batch_size < 1:
        raise ValueError(f"texts and batch_size must be at least one; got {len(texts)} and {batch_size}")
    features = codec.encode([{"text": text} for text in texts])
    empty = next((index for index, feature in enumerate(features) if not feature["input_ids"]), None)
    if empty is not None:
        raise ValueError(f"texts[{empty}]: expected a text with tokens; got {texts[empty]!r}")
    order = sorted(range(len(features)), key=lambda index: -len(features[index]["input_ids"]))
    found: list[Tensor] = [torch.empty(0)] * len(features)
    was_training = model.training
    model.eval()
    try:
        for begin in range(0, len(order), batch_size):
            indices = order[begin : begin + batch_size]
            batch = codec.collator([features[index] for index in indices])
            with torch.no_grad():
                vectors = model.encode(**{name: tensor.to(model.device) for name, tensor in batch.items()})
            vectors = vectors.float().cpu()
            for index, vector in zip(indices, vectors, strict=True):
                found[index] = vector
    finally:
        model.train(was_training)
    return torch.stack(found)


def pair_records(loaded: Loaded, examples: Rows, asked: Asked) -> Iterator[dict[str, Any]]:
    """{"query", "hits": [{"text", "score"}, ...]} where there are candidates, else {"text", "embedding"}."""
    texts = [text_in(example) for example in examples]
    yield from vector_records(
        loaded, texts, embed(loaded.model, loaded.codec, texts, batch_size=asked.batch_size), asked
    )


def text_in(example: Mapping[str, Any]) -> str:
    """The text of an example that is a text alone."""
    text: str = example.get("text", example.get("query"))
    return text


def vector_records(loaded: Loaded, texts: Sequence[str], vectors: Tensor, asked: Asked) -> Iterator[dict[str, Any]]:
    """The records of `pair_records` of texts whose vectors (T, D), of length 1, are there."""
    if asked.candidates is None:
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            yield {"text": text, "embedding": [round(value, 6) for value in vector]}
        return
    candidates = list(dict.fromkeys(asked.candidates))
    against = embed(loaded.model, loaded.codec, candidates, batch_size=asked.batch_size)
    for text, hits in zip(texts, ranking(vectors, against, asked.top), strict=True):
        found = [{"text": candidates[index], "score": round(score, 6)} for index, score in hits]
        yield {"query": text, "hits": found}


def pair_line(record: Mapping[str, Any]) -> str:
    """A line for each hit: query, cosine and text between tabs; or a text and its numbers between blanks."""
    if "hits" in record:
        return "\n".join(f"{record['query']}\t{hit['score']:.4f}\t{hit['text']}" for hit in record["hits"])
    return f"{record['text']}\t{' '.join(f'{value:.6f}' for value in record['embedding'])}"
