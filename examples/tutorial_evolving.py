"""The tutorial "P-Tuning v2" with prompts that evolve: its training loop on a small transformer from scratch.

    python examples/tutorial_evolving.py --epochs 2 --output tutorial-evolving.pt

Only the import is another one than the tutorial's; docs/from-the-tutorials.md says what is where.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from ptv2_fast.tutorials import PTuningV2Model


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"vocab-size": 50257, "d-model": 768, "num-layers": 12, "num-heads": 12, "d-ff": 3072, "prefix-len": 20}
    for name, size in {**sizes, "seq-len": 100, "batch-size": 4, "epochs": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("tutorial-evolving.pt"), help="file for the prompt")
    return parser.parse_args()


def main() -> None:
    options = options_of()
    torch.manual_seed(0)
    sizes = (options.vocab_size, options.d_model, options.num_layers, options.num_heads, options.d_ff)
    model = PTuningV2Model(*sizes, options.prefix_len)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    # Everything is frozen but the prompts.
    for name, param in model.named_parameters():
        if "prompt_embeddings" not in name:
            param.requires_grad = False

    trainable_params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable_params, lr=options.lr)
    loss_function = nn.CrossEntropyLoss()
    for epoch in range(options.epochs):
        input_ids = torch.randint(0, options.vocab_size, (options.batch_size, options.seq_len), device=device)
        labels = input_ids.clone()
        optimizer.zero_grad()
        text_logits = model(input_ids)  # of the text alone: (batch size, sequence length, vocabulary)
        loss = loss_function(text_logits.reshape(-1, options.vocab_size), labels.reshape(-1))
        loss.backward()
        optimizer.step()
        print(f"Epoch {epoch + 1}, Loss: {loss.item():.4f}")

    for name, param in model.named_parameters():
        if param.grad is not None:
            print(f"gradient: {name} {tuple(param.grad.shape)}")
    torch.save({"prompt_embeddings": model.prompt_embeddings.detach()}, options.output)


if __name__ == "__main__":
    main()
