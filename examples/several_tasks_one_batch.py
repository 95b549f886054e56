"""Several tasks in one batch: each row has its own prompt and head, one frozen encoder runs once.

    python examples/several_tasks_one_batch.py "I loved the concert in Paris." "Ada hated the food in Rome."

Takes the folders that sentiment_sst2.py and ner_wnut17.py leave, both trained on the same --model.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModel, AutoTokenizer

from ptv2_fast import PTuningV2Model

SENTENCES = ["I loved the concert in Paris.", "Ada hated the food in Rome."]


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sentences", nargs="*", default=SENTENCES)
    parser.add_argument("--model", default="bert-base-cased", help="the encoder of both prompts")
    parser.add_argument("--sentiment", default="sentiment-prompt", help="folder of the first prompt")
    parser.add_argument("--ner", default="ner-prompt", help="folder of the second prompt")
    return parser.parse_args()


def main() -> None:
    options = options_of()
    base = AutoModel.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    model = PTuningV2Model.from_pretrained(base, options.sentiment, adapter_name="sentiment")
    model.load_adapter(options.ner, "ner")
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    # Every sentence is in the batch twice, once for each task.
    count = len(options.sentences)
    batch = tokenizer(options.sentences * 2, padding=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        rows = model(**batch, adapter_names=["sentiment"] * count + ["ner"] * count).logits

    # Heads of different kinds give one tensor a row: (classes,) or (tokens, tags).
    classes = model.ptv2_config["sentiment"].heads["task"].labels
    tags = model.ptv2_config["ner"].heads["task"].labels
    for index, sentence in enumerate(options.sentences):
        chances = rows[index].softmax(-1)
        best = int(chances.argmax())
        print(f"{sentence}\n  sentiment: {classes[best]} ({float(chances[best]):.2f})")
        row = count + index
        seen = set()
        for token, word in enumerate(batch.word_ids(row)):
            # A word has the tag of its first sub-word; special tokens belong to no word.
            if word is None or word in seen:
                continue
            seen.add(word)
            tag = tags[int(rows[row][token].argmax())]
            if tag != "O":
                span = batch.word_to_chars(row, word)
                print(f"  {tag}: {sentence[span.start : span.end]}")


if __name__ == "__main__":
    main()
