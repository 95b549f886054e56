"""Sentences read by both adapters: the mood, what each word does to it, and the entities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ptv2_fast import PTuningV2Model
from ptv2_fast.training.records import words_of
from ptv2_fast.training.task_data import TaskCodec
from ptv2_fast.training.tokens import decode_tags


@dataclass(frozen=True)
class ReadSentence:
    """What the model says about a sentence.

    Attributes:
        text: as it was written.
        tags: one IOB2 tag for each of `words_of(text)`.
        mood, chance: the likelier class, and its probability.
        effects: by how much each word holds the mood up: what the mood's log-odds lose, in nats, when the sentence is
            read without the word. 0 for punctuation, and for the only word.
    """

    text: str
    tags: Sequence[str]
    mood: str
    chance: float
    effects: Sequence[float]


@torch.no_grad()
def read_sentences(
    model: PTuningV2Model, codecs: Mapping[str, TaskCodec], sentences: Sequence[str]
) -> list[ReadSentence]:
    """Classify and tag each sentence, and classify it without each of its words, in one batch a sentence.

    Every row of a batch has its own adapter: one pass over the one encoder serves both tasks.

    Args:
        codecs: of "sentiment" and "ner", which are the model's adapters.
    """
    mood, names = codecs["sentiment"], codecs["ner"]
    device = next(model.parameters()).device
    model.eval()
    found = []
    for sentence in sentences:
        shortened = without_each_word(sentence)
        texts = [{"text": text} for text in (sentence, *shortened.values())]
        tagged = names.encode([{"tokens": words_of(sentence)}], quiet=True)
        batch = mood.collator([*mood.encode(texts, quiet=True), *tagged])
        adapters = ["sentiment"] * len(texts) + ["ner"]
        logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}, adapter_names=adapters).logits
        chances = torch.stack([logits[row] for row in range(len(texts))]).double().log_softmax(-1).exp()
        best = int(chances[0].argmax())
        odds = torch.logit(chances[:, best], eps=1e-12)
        effects = [0.0] * len(words_of(sentence))
        for row, index in enumerate(shortened, start=1):
            effects[index] = float(odds[0] - odds[row])
        tags = decode_tags(logits[len(texts)].argmax(-1).tolist(), tagged[0], names.known_labels)
        found.append(ReadSentence(sentence, tags, mood.known_labels.to_name(best), float(chances[0, best]), effects))
    return found


def without_each_word(sentence: str) -> dict[int, str]:
    """The sentence without one of its words, by the word's index among `words_of(sentence)`.

    Punctuation stays where it is; a sentence of a single word has nothing left to read.
    """
    words = words_of(sentence)
    spoken = [index for index, word in enumerate(words) if any(character.isalnum() for character in word)]
    shortened, end = {}, 0
    for index, word in enumerate(words):
        start = sentence.index(word, end)
        end = start + len(word)
        if index in spoken and len(spoken) > 1:
            shortened[index] = " ".join((sentence[:start] + sentence[end:]).split())
    return shortened
