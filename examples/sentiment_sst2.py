"""Sentiment: deep prompts on a frozen BERT, trained with transformers' own Trainer.

    python examples/sentiment_sst2.py --data sst2 --output sentiment-prompt

The folder holds train.tsv and dev.tsv: a sentence and its label on each line, with a tab between.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.training.data import LabelSet, read_examples


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bert-base-cased", help="encoder: a hub name or a folder")
    parser.add_argument("--data", type=Path, default=Path("sst2"), help="folder with train.tsv and dev.tsv")
    parser.add_argument("--output", type=Path, default=Path("sentiment-prompt"), help="folder for the trained prompt")
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch-size", type=int, default=32)
    return parser.parse_args()


def encode(examples: list[dict], tokenizer, labels: LabelSet) -> list[dict]:
    rows = [dict(tokenizer(example["text"], truncation=True, max_length=128)) for example in examples]
    return [{**row, "labels": labels.to_id(example["label"])} for row, example in zip(rows, examples, strict=True)]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    options = options_of()
    set_seed(0)

    train = read_examples(options.data / "train.tsv", "SEQ_CLS")
    labels = LabelSet.from_examples(train)
    dev = read_examples(options.data / "dev.tsv", "SEQ_CLS", labels=labels)

    base = AutoModel.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    head = HeadConfig("SEQ_CLS", len(labels), pooling="mean", labels=labels.names)
    config = PTuningV2Config("SEQ_CLS", options.num_virtual_tokens, injection="deep", heads={"task": head})
    sentences = [example["text"] for example in train[: options.num_virtual_tokens]]
    model = get_ptv2_model(base, config, tokenizer=tokenizer, init_text=sentences)
    model.print_trainable_parameters()

    arguments = TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        per_device_train_batch_size=options.batch_size,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to=[],
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encode(train, tokenizer, labels),
        eval_dataset=encode(dev, tokenizer, labels),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    model.save_pretrained(options.output)
    print(f"dev accuracy {trainer.evaluate()['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
