"""A training loop of one's own with GraphRunner: packed batches, on a GPU whole steps replayed as CUDA graphs.

    python examples/packed_training.py --data sst2 --output packed-prompt

Without CUDA the same steps run eagerly, packed all the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from ptv2_fast import GraphRunner, HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.training.data import LabelSet, read_examples
from ptv2_fast.training.predict import evaluate
from ptv2_fast.training.task_data import TaskCodec


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bert-base-cased", help="encoder: a hub name or a folder")
    parser.add_argument("--data", type=Path, default=Path("sst2"), help="folder with train.tsv and dev.tsv")
    parser.add_argument("--output", type=Path, default=Path("packed-prompt"), help="folder for the trained prompt")
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch-size", type=int, default=32)
    return parser.parse_args()


def main() -> None:
    options = options_of()
    torch.manual_seed(0)

    train = read_examples(options.data / "train.tsv", "SEQ_CLS")
    labels = LabelSet.from_examples(train)
    dev = read_examples(options.data / "dev.tsv", "SEQ_CLS", labels=labels)

    base = AutoModel.from_pretrained(options.model).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    codec = TaskCodec("SEQ_CLS", tokenizer, labels, max_length=128)
    # Packed rows are read at one token each: "first" or "last", not "mean".
    head = HeadConfig("SEQ_CLS", len(labels), pooling="first", labels=labels.names)
    config = PTuningV2Config("SEQ_CLS", options.num_virtual_tokens, injection="deep", heads={"task": head})
    sentences = [example["text"] for example in train[: options.num_virtual_tokens]]
    model = get_ptv2_model(base, config, tokenizer=tokenizer, init_text=sentences).train()
    model.print_trainable_parameters()

    # Batches stay padded and on the CPU: the runner packs them and moves them.
    loader = DataLoader(codec.encode(train), options.batch_size, shuffle=True, collate_fn=codec.collator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], options.lr, weight_decay=0.0)
    # The runner comes before the scheduler: it prepares the learning rate for the graphs.
    runner = GraphRunner(model, optimizer, max_grad_norm=1.0)
    steps = options.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    for epoch in range(1, options.epochs + 1):
        start, losses = time.perf_counter(), []
        for batch in loader:
            losses.append(runner.step(batch))
            scheduler.step()
        # Reading a loss waits for the GPU, so it is done once an epoch.
        loss = torch.stack(losses).mean().item()
        print(f"epoch {epoch}: loss {loss:.4f}, {len(losses) / (time.perf_counter() - start):.1f} steps/s")

    print(f"sizes of batches captured in CUDA graphs: {runner.captured}")
    model.save_pretrained(options.output)
    print(f"dev accuracy {evaluate(model, codec, dev, batch_size=options.batch_size)['accuracy']:.4f}")


if __name__ == "__main__":
    main()
