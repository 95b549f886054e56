"""Training steps of the two tutorials' classes: `ptv2_fast.tutorials` beside the literal forms, on the CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.tutorials --out benchmarks/results/tutorials_minilm_cpu.json

Forward and backward of a mean cross-entropy, prompts and heads trained, everything else frozen, with the models'
dropout and without. The deep tutorial runs on MiniLM's own weights, half of its rows padded; the evolving one, which
knows no padding, has MiniLM's sizes. Steps take turns, and what counts is the processor's time: other processes on the
machine lengthen both alike.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel

from benchmarks.environment import describe
from benchmarks.measure import quantiles
from benchmarks.record import write_json
from benchmarks.weights import minilm_folder
from ptv2_fast.reference import deep_tutorial as deep_literal
from ptv2_fast.reference import evolving_tutorial as evolving_literal
from ptv2_fast.tutorials import P_Tuning_Model, PTuningV2Model

ROWS, TOKENS, PROMPT, PADDING, LABELS = 8, 64, 40, 0.4, 2
# How far two float32 results of a step may lie apart, relative to their size.
TOLERANCE = 1e-4

Loss = Callable[[nn.Module], torch.Tensor]


def deep_models() -> tuple[dict[str, nn.Module], Loss]:
    """Either class on the same weights, the literal one with torch's own attention, as AutoModel loads it; a loss."""
    base = AutoModel.from_pretrained(minilm_folder(), dtype=torch.float32)
    ids = torch.randint(1000, base.config.vocab_size, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[ROWS // 2 :, TOKENS - round(PADDING * TOKENS) :] = 0
    labels = torch.arange(ROWS) % LABELS
    models = {}
    for name, kind in (("ours", P_Tuning_Model), ("literal", deep_literal.P_Tuning_Model)):
        torch.manual_seed(0)
        models[name] = kind(copy.deepcopy(base), PROMPT, [LABELS])
    return models, lambda model: nn.functional.cross_entropy(model(ids, mask), labels)


def evolving_models() -> tuple[dict[str, nn.Module], Loss]:
    """The same for the other tutorial, with its dropout and its freezing, and as many words as MiniLM knows."""
    sizes = {"vocab_size": 30522, "d_model": 384, "num_layers": 6, "num_heads": 12, "d_ff": 1536, "prefix_len": PROMPT}
    ids = torch.randint(0, sizes["vocab_size"], (ROWS, TOKENS))
    models = {}
    for name, kind in (("ours", PTuningV2Model), ("literal", evolving_literal.PTuningV2Model)):
        torch.manual_seed(0)
        models[name] = kind(**sizes)
        for parameter, tensor in models[name].named_parameters():
            tensor.requires_grad_("prompt_embeddings" in parameter)
    return models, lambda model: nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def check(models: Mapping[str, nn.Module], loss_of: Loss) -> None:
    """Raise AssertionError unless all give the same loss and gradients without dropout."""
    found = []
    for model in models.values():
        loss = loss_of(model.eval())
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, trained)])
    for ours, theirs in zip(*found, strict=True):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error < TOLERANCE, f"a step must be the literal form's; relative error {error:.1e}"


def without_dropout(model: nn.Module) -> None:
    """Set every module's dropout to zero; the model stays in training mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # attention's own
            module.dropout = 0.0


def measure(models: Mapping[str, nn.Module], loss_of: Loss, rounds: int) -> dict[str, object]:
    """Medians of the processor's milliseconds, and how often the literal form's fits ours."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 2):
        for name, model in models.items():
            model.train().zero_grad()
            start = time.process_time()
            loss_of(model).backward()
            if turn >= 2:  # warm
                samples[name].append(1e3 * (time.process_time() - start))
    medians = {name: dict(zip(("ms", "p20", "p80"), quantiles(own), strict=False)) for name, own in samples.items()}
    return {**medians, "literal_over_ours": medians["literal"]["ms"] / medians["ours"]["ms"], "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"rows": ROWS, "tokens": TOKENS, "prompt": PROMPT, "padding": PADDING, "dtype": "float32"}
    command = ["python", "-m", "benchmarks.tutorials", *sys.argv[1:]]
    record: dict[str, object] = {"command": command, "environment": describe(torch.device("cpu")), "sizes": sizes}
    for name, (models, loss_of) in (("deep", deep_models()), ("evolving", evolving_models())):
        check(models, loss_of)
        record[name] = measure(models, loss_of, options.rounds)
        for model in models.values():
            without_dropout(model)
        record[f"{name}, no dropout"] = measure(models, loss_of, options.rounds)
        for cell in (name, f"{name}, no dropout"):
            print(f"{cell}: the literal form takes {record[cell]['literal_over_ours']:.2f} times as long")
    write_json(options.out, record)


if __name__ == "__main__":
    main()
