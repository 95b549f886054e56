"""The tutorial "A Deep Dive into P-Tuning v2": one frozen encoder, sentences with a label and words with tags.

    python examples/tutorial_deep.py --model bert-base-cased --output tutorial-deep.pt

Only the import is another one than the tutorial's; docs/from-the-tutorials.md says what is where.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from ptv2_fast.tutorials import P_Tuning_Model

SENTENCES = [
    ("the film was very good", 1), ("a great film", 1), ("the tower was fine", 1), ("anna was good", 1),
    ("the film was very bad", 0), ("a poor film", 0), ("the tower was awful", 0), ("anna was bad", 0),
]  # fmt: skip
TAGS = ["O", "PER", "LOC"]
TAGGED = [
    ("anna met bob in paris", "PER O PER O LOC"), ("lee saw the river in oslo", "PER O O O O LOC"),
    ("bob likes rome", "PER O LOC"), ("the tower of paris", "O O O LOC"),
]  # fmt: skip
TRAINED = ("prompt_encoder", "classification_heads")


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bert-base-cased", help="encoder: a hub name or a folder")
    parser.add_argument("--output", type=Path, default=Path("tutorial-deep.pt"), help="file for prompts and heads")
    parser.add_argument("--prompt-length", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-2)
    return parser.parse_args()


def label_words(encoded, tags: list[list[str]]) -> torch.Tensor:
    """(B, N) the tag of each word at its first token; -100 at all others."""
    labels = torch.full_like(encoded["input_ids"], -100)
    for row, names in enumerate(tags):
        words = encoded.word_ids(row)
        for place, word in enumerate(words):
            if word is not None and words[place - 1] != word:
                labels[row, place] = TAGS.index(names[word])
    return labels


def main() -> None:
    options = options_of()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = P_Tuning_Model(options.model, options.prompt_length, num_labels_list=[2, len(TAGS)])
    device = model.device

    sentences = tokenizer([text for text, _ in SENTENCES], padding=True, return_tensors="pt").to(device)
    classes = torch.tensor([label for _, label in SENTENCES], device=device)
    words = [text.split() for text, _ in TAGGED]
    tagged = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt").to(device)
    tags = label_words(tagged, [names.split() for _, names in TAGGED])

    trainable_params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable_params, lr=options.lr)
    loss_function = nn.CrossEntropyLoss()  # which ignores labels of -100
    model.train()
    for epoch in range(options.epochs):
        optimizer.zero_grad()
        logits = model(sentences["input_ids"], sentences["attention_mask"], task_idx=0)
        token_logits = model.token_logits(tagged["input_ids"], tagged["attention_mask"], task_idx=1)
        loss = loss_function(logits, classes) + loss_function(token_logits.transpose(1, 2), tags)
        loss.backward()
        optimizer.step()
        print(f"Epoch {epoch + 1}, Loss: {loss.item():.4f}")

    # What was trained is a small part of the state; the base is as it was.
    torch.save({name: t for name, t in model.state_dict().items() if name.startswith(TRAINED)}, options.output)

    # Inference: the frozen base, and the small checkpoint.
    model = P_Tuning_Model(options.model, options.prompt_length, num_labels_list=[2, len(TAGS)])
    model.load_state_dict(torch.load(options.output), strict=False)
    model.eval()
    with torch.no_grad():
        logits = model(sentences["input_ids"], sentences["attention_mask"], task_idx=0)
        token_logits = model.token_logits(tagged["input_ids"], tagged["attention_mask"], task_idx=1)
    for (text, _), guess in zip(SENTENCES, logits.argmax(-1).tolist(), strict=True):
        print(f"{text}: {('negative', 'positive')[guess]}")
    for row, (text, _) in enumerate(TAGGED):
        guesses = token_logits[row][tags[row] != -100].argmax(-1).tolist()
        print(" ".join(f"{word}/{TAGS[guess]}" for word, guess in zip(text.split(), guesses, strict=True)))


if __name__ == "__main__":
    main()
