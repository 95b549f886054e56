"""Question answering: prefix prompts on a frozen BERT, from SQuAD's JSON to answers and their F1.

    python examples/question_answering.py --data squad --output qa-prompt

Data in SQuAD's own JSON, or one question a line with its context and answers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.training.data import read_examples
from ptv2_fast.training.fit import FitSettings, fit
from ptv2_fast.training.predict import evaluate, predict
from ptv2_fast.training.task_data import TaskCodec


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bert-base-cased", help="encoder: a hub name or a folder")
    parser.add_argument("--data", type=Path, default=Path("squad"), help="folder with the two files below")
    parser.add_argument("--train-file", default="train-v1.1.json")
    parser.add_argument("--dev-file", default="dev-v1.1.json")
    parser.add_argument("--output", type=Path, default=Path("qa-prompt"), help="folder for the trained prompt")
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch-size", type=int, default=16)
    return parser.parse_args()


def main() -> None:
    options = options_of()
    torch.manual_seed(0)

    train = read_examples(options.data / options.train_file, "QUESTION_ANS")
    dev = read_examples(options.data / options.dev_file, "QUESTION_ANS")

    base = AutoModel.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # A context that is too long becomes several windows that share `doc_stride` tokens.
    has_unanswerable = any(not example["answers"]["text"] for example in train)
    codec = TaskCodec("QUESTION_ANS", tokenizer, max_length=384, doc_stride=128, no_answer=has_unanswerable)

    # Two outputs per token: does the answer start here, does it end here.
    head = HeadConfig("QUESTION_ANS", 2)
    config = PTuningV2Config("QUESTION_ANS", options.num_virtual_tokens, injection="prefix", heads={"task": head})
    model = get_ptv2_model(base, config, tokenizer=tokenizer, init_text=train[0]["context"])
    model.print_trainable_parameters()

    settings = FitSettings(learning_rate=options.lr, epochs=options.epochs, batch_size=options.batch_size)
    fit(model, codec, train, dev, settings=settings, checkpoints=options.output / "checkpoints")
    model.save_pretrained(options.output)

    scores = evaluate(model, codec, dev, batch_size=options.batch_size)
    print(f"dev answer F1 {scores['f1']:.2f}, exact match {scores['exact_match']:.2f}")
    (answer,) = predict(model, codec, dev[:1])
    print(f"{dev[0]['question']} -> {answer.value or 'no answer'}")


if __name__ == "__main__":
    main()
