"""Named entities: deep prompts on a frozen BERT, from a folder of CoNLL files to entity F1.

    python examples/ner_wnut17.py --data wnut17 --output ner-prompt

The folder holds train.conll, dev.conll and test.conll: a word and its tag on each line, a blank line after a sentence.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.training.data import LabelSet, read_examples
from ptv2_fast.training.fit import FitSettings, fit
from ptv2_fast.training.predict import evaluate
from ptv2_fast.training.task_data import TaskCodec


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bert-base-cased", help="encoder: a hub name or a folder")
    parser.add_argument("--data", type=Path, default=Path("wnut17"), help="folder with the three files")
    parser.add_argument("--output", type=Path, default=Path("ner-prompt"), help="folder for the trained prompt")
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch-size", type=int, default=32)
    return parser.parse_args()


def main() -> None:
    options = options_of()
    torch.manual_seed(0)

    train = read_examples(options.data / "train.conll", "TOKEN_CLS")
    # A tag that training has not seen is an error where it stands.
    labels = LabelSet.from_examples(train)
    dev = read_examples(options.data / "dev.conll", "TOKEN_CLS", labels=labels)
    test = read_examples(options.data / "test.conll", "TOKEN_CLS", labels=labels)

    base = AutoModel.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # Words become sub-words; the first one of each word carries its tag.
    codec = TaskCodec("TOKEN_CLS", tokenizer, labels, max_length=128)

    head = HeadConfig("TOKEN_CLS", len(labels), labels=labels.names)
    config = PTuningV2Config("TOKEN_CLS", options.num_virtual_tokens, injection="deep", heads={"task": head})
    # The prompt starts as what the frozen model computes for a few training sentences.
    sentences = [" ".join(example["tokens"]) for example in train[: options.num_virtual_tokens]]
    model = get_ptv2_model(base, config, tokenizer=tokenizer, init_text=sentences)
    model.print_trainable_parameters()

    settings = FitSettings(learning_rate=options.lr, epochs=options.epochs, batch_size=options.batch_size)
    result = fit(model, codec, train, dev, settings=settings, checkpoints=options.output / "checkpoints")
    model.save_pretrained(options.output)
    print(f"dev entity F1 {result.scores['f1']:.4f} after epoch {result.best_epoch}, the best one")

    scores = evaluate(model, codec, test, batch_size=options.batch_size)
    print(f"test entity F1 {scores['f1']:.4f} (precision {scores['precision']:.4f}, recall {scores['recall']:.4f})")


if __name__ == "__main__":
    main()
