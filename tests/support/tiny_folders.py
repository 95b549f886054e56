"""Tiny models with tokenizers as folders, and toy data of every task, for tests that start from files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[END]")
FILLERS = "the a of in to film was river tower bank met saw likes very".split()
GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")
PEOPLE, PLACES = ("anna", "bob", "lee"), ("paris", "rome", "oslo")
WORDS = (*SPECIAL, *FILLERS, *GOOD, *BAD, *PEOPLE, *PLACES, "who", "where", "is", "?", ".")


def tiny_tokenizer(*, causal: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Whole words; [CLS] text [SEP] for encoders, the bare text for causal models."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if causal:
        inputs, names = ["input_ids", "attention_mask"], {**names, "eos_token": "[END]"}
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
        names = {**names, "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def tiny_bert() -> transformers.BertModel:
    """Two layers of width 32 with random weights, the same ones every time."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertModel(config).eval()


def bert_folder(path: Path) -> Path:
    """A folder that AutoModel and AutoTokenizer read."""
    tiny_bert().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_llama() -> transformers.LlamaForCausalLM:
    """The same for a causal language model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=4,
    )
    return transformers.LlamaForCausalLM(config).eval()


def llama_folder(path: Path) -> Path:
    """A folder that AutoModelForCausalLM and AutoTokenizer read."""
    tiny_llama().save_pretrained(path)
    tiny_tokenizer(causal=True).save_pretrained(path)
    return path


def toy_examples(task_type: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Examples whose answer is decided by single words."""
    generator = random.Random(seed)
    return [_MAKERS[task_type](generator, number) for number in range(count)]


def _words(generator: random.Random, low: int = 2, high: int = 7) -> list[str]:
    return generator.choices(FILLERS, k=generator.randint(low, high))


def _sentence(generator: random.Random, number: int) -> dict[str, Any]:
    words = _words(generator, 1, 4) + generator.choices(GOOD if number % 2 else BAD, k=2)
    generator.shuffle(words)
    return {"text": " ".join(words), "label": ("negative", "positive")[number % 2]}


def _tagged(generator: random.Random, number: int) -> dict[str, Any]:
    kinds = {**dict.fromkeys(PEOPLE, "B-PER"), **dict.fromkeys(PLACES, "B-LOC")}
    tokens = _words(generator) + [generator.choice(PEOPLE), generator.choice(PLACES)]
    generator.shuffle(tokens)
    return {"tokens": tokens, "tags": [kinds.get(token, "O") for token in tokens]}


def _question(generator: random.Random, number: int) -> dict[str, Any]:
    answer = generator.choice(PEOPLE if number % 2 else PLACES)
    words = _words(generator, 3, 8)
    words.insert(generator.randrange(len(words) + 1), answer)
    context = " ".join(words)
    answers = {"text": [answer], "answer_start": [(" " + context + " ").index(f" {answer} ")]}
    question = "who is ?" if number % 2 else "where is ?"
    return {"id": str(number), "question": question, "context": context, "answers": answers}


def _text(generator: random.Random, number: int) -> dict[str, Any]:
    return {"text": f"{generator.choice(PEOPLE)} likes the very {generator.choice(GOOD)} film of {PLACES[0]} ."}


_MAKERS = {"SEQ_CLS": _sentence, "TOKEN_CLS": _tagged, "QUESTION_ANS": _question, "CAUSAL_LM": _text}


def toy_file(folder: Path, task_type: str, count: int, name: str = "train", seed: int = 0) -> Path:
    """The toy examples of a task in the format that is usual for it."""
    examples = toy_examples(task_type, count, seed)
    if task_type == "SEQ_CLS":
        lines = ["sentence\tlabel"] + [f"{example['text']}\t{example['label']}" for example in examples]
        return _written(folder / f"{name}.tsv", lines)
    if task_type == "TOKEN_CLS":
        rows = ["\n".join(map("\t".join, zip(e["tokens"], e["tags"], strict=True))) + "\n" for e in examples]
        return _written(folder / f"{name}.conll", rows)
    if task_type == "QUESTION_ANS":
        return _written(folder / f"{name}.jsonl", [json.dumps(example) for example in examples])
    return _written(folder / f"{name}.txt", [example["text"] for example in examples])


def _written(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
