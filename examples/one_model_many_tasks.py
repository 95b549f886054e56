"""One frozen language model that chats, tags and classifies: three prompts, one batch for all of them.

    python examples/one_model_many_tasks.py --output three-prompts

Trains a small prompt for each task, saves them, and answers one mixed batch in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers as hf

from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, demo, get_ptv2_model
from ptv2_fast.training.data import read_examples

DATA = Path(__file__).parent / "data"
QUESTION, SENTENCE, MESSAGE = "When do you open?", "Ada Lovelace met Charles in Paris .", "Claim your free prize today"


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="with a chat template")
    parser.add_argument("--output", type=Path, default=Path("three-prompts"), help="folder for the trained prompts")
    parser.add_argument("--answer", action="store_true", help="do not train; load what --output holds and answer")
    parser.add_argument("--sentences", type=int, default=160, help="how many the tagger learns from")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--repeats", type=int, default=5, help="of the timed passes")
    parser.add_argument("--num-virtual-tokens", type=int, default=16)
    return parser.parse_args()


def chat_row(tokenizer, messages: list[dict]) -> dict:
    """Tokens of a conversation; labels of its reply alone."""
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    parts = asked, tokenizer.apply_chat_template(messages, tokenize=False)[len(asked) :]
    given, reply = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    return {"input_ids": given + reply, "labels": [-100] * len(given) + reply}


def at_words(words: list[str], offsets: list, values: list) -> list:
    """Of values, one for each token, those at the first token of each word, where the command line reads tags too."""
    starts = [len(" ".join(words[:count])) + (count > 0) for count in range(len(words))]
    places = [next(place for place, (_, end) in enumerate(offsets) if end > start) for start in starts]
    return [values[place] for place in places]


def tag_row(tokenizer, example: dict, tags: list[str]) -> dict:
    """Tokens of a sentence; labels at the first token of each word."""
    encoded = tokenizer(" ".join(example["tokens"]), add_special_tokens=False, return_offsets_mapping=True)
    labels = [-100] * len(encoded["input_ids"])
    places = at_words(example["tokens"], encoded["offset_mapping"], list(range(len(labels))))
    for place, tag in zip(places, example["tags"], strict=True):
        labels[place] = tags.index(tag)
    return {"input_ids": encoded["input_ids"], "labels": labels}


def train(options: argparse.Namespace) -> None:
    hf.set_seed(0)
    tokenizer = hf.AutoTokenizer.from_pretrained(options.model)
    base = hf.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    examples = read_examples(Path(demo.__file__).parent / "data" / "ner_train.conll", "TOKEN_CLS")[: options.sentences]
    tags = sorted({tag for example in examples for tag in example["tags"]})
    messages = [row.split("\t") for row in (DATA / "messages.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    conversations = [json.loads(row)["messages"] for row in (DATA / "chat.jsonl").read_text("utf-8").splitlines()]
    rows = {
        "chat": [chat_row(tokenizer, conversation) for conversation in conversations] * 8,
        "ner": [tag_row(tokenizer, example, tags) for example in examples],
        "spam": [{"labels": int(label == "spam"), **tokenizer(text)} for text, label in messages] * 2,
    }
    tagger = HeadConfig("TOKEN_CLS", len(tags), labels=tags)
    classifier = HeadConfig("SEQ_CLS", 2, pooling="mean", labels=["ham", "spam"])
    length = options.num_virtual_tokens
    configs = {
        "chat": PTuningV2Config("CAUSAL_LM", length, injection="prefix"),
        "ner": PTuningV2Config("TOKEN_CLS", length, heads={"ner": tagger}),
        "spam": PTuningV2Config("SEQ_CLS", length, heads={"spam": classifier}),
    }
    # A prompt starts as what the frozen model computes for a few texts of its task.
    texts = {
        "chat": [conversation[-1]["content"] for conversation in conversations],
        "ner": [" ".join(example["tokens"]) for example in examples[:length]],
        "spam": [text for text, _ in messages],
    }
    model = get_ptv2_model(base, configs["chat"], "chat", tokenizer=tokenizer, init_text=texts["chat"])
    for name in ("ner", "spam"):
        model.add_adapter(name, configs[name], tokenizer=tokenizer, init_text=texts[name])
    collators = [hf.DataCollatorForSeq2Seq, hf.DataCollatorForTokenClassification, hf.DataCollatorWithPadding]
    for (name, examples), collator in zip(rows.items(), collators, strict=True):
        model.set_adapter(name)
        arguments = hf.TrainingArguments(
            options.output / "log", num_train_epochs=options.epochs, learning_rate=options.lr, save_strategy="no",
            per_device_train_batch_size=8, logging_strategy="epoch", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = hf.Trainer(model, arguments, collator(tokenizer), examples)
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        print(f"{name}: loss {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last")
    model.save_pretrained(options.output)
    for name in model.adapters:
        size = (options.output / name / "ptv2_model.safetensors").stat().st_size
        print(f"{name}: {size / 2**20:.2f} MiB in {options.output / name}")


def answer(options: argparse.Namespace) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(options.model, padding_side="left")
    base = hf.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = PTuningV2Model.from_pretrained(base, options.output)
    asked = [{"role": "user", "content": QUESTION}]
    texts = [tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True), SENTENCE, MESSAGE]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    how = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    output = model.generate(**batch, adapter_names=["chat", "ner", "spam"], **how)
    reply = tokenizer.decode(output.sequences[0, batch.input_ids.shape[1] :], skip_special_tokens=True)
    print(f"{QUESTION} -> {reply.strip()}")
    words, real = SENTENCE.split(), batch.attention_mask[1].bool()
    offsets = [offset for offset, is_real in zip(batch.encodings[1].offsets, real, strict=True) if is_real]
    ids = at_words(words, offsets, output.logits[1].argmax(-1)[real].tolist())
    tags, labels = (model.ptv2_config[name].heads[name].labels for name in ("ner", "spam"))
    print(" ".join(f"{word}/{tags[tag]}" for word, tag in zip(words, ids, strict=True)))
    print(f"{MESSAGE} -> {labels[int(output.logits[2].argmax())]}")

    # The same rows through the bare model, one token each: what the three prompts cost in a pass that reads them all.
    once, seconds = {**how, "max_new_tokens": 1}, {"prompts": [], "bare": []}
    for _ in range(options.repeats):
        for which, names in (("prompts", ["chat", "ner", "spam"]), ("bare", ["__base__"] * 3)):
            start = time.perf_counter()
            model.generate(**batch, adapter_names=names, **once)
            seconds[which].append(time.perf_counter() - start)
    with_prompts, bare = map(statistics.median, seconds.values())
    print(f"one pass: {1e3 * with_prompts:.0f} ms, the bare model {1e3 * bare:.0f} ms, x{with_prompts / bare:.2f}")


if __name__ == "__main__":
    if options_of().answer:
        answer(options_of())
    else:
        train(options_of())
        # Another program needs the base and the saved folder only.
        command = [sys.executable, __file__, *sys.argv[1:], "--answer"]
        print(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout, end="")
