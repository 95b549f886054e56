"""How good each method gets: head only, shallow, prefix, deep and full fine-tuning on real tasks.

    python -m benchmarks.quality --data DIR --out FILE

DIR holds sst2/{train,dev,test}.tsv and wnut17/{train,dev,test}.conll. For each task and method a
small search on part of the training rows chooses P and the learning rate by the dev metric; the
final run trains on all rows, keeps the best epoch on dev, and is scored on test once. The JSON is
written whole after every run, so that an interrupted comparison goes on with --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.quality import language_model
from benchmarks.quality.models import METHODS, Candidate, build
from benchmarks.quality.plan import ORDER, PLANS, Plan, fast
from benchmarks.weights import minilm_folder
from ptv2_fast.saving.checkpoint import write_whole
from ptv2_fast.training.data import LabelSet, read_examples
from ptv2_fast.training.fit import FitSettings, fit
from ptv2_fast.training.metrics import metric_for
from ptv2_fast.training.predict import evaluate
from ptv2_fast.training.task_data import TaskCodec

TASKS = {"sst2": ("SEQ_CLS", ".tsv"), "wnut17": ("TOKEN_CLS", ".conll")}
LANGUAGE_MODEL = "smollm2"
MAX_LENGTH = 64
BATCH_SIZE = 32
SEED = 0
_PACKAGES = ("torch", "transformers", "accelerate")


@dataclasses.dataclass(frozen=True)
class Task:
    """One data set, read and ready."""

    codec: TaskCodec
    splits: dict[str, list[dict[str, Any]]]


class Results:
    """The JSON file: read where a run resumes, written whole after each change."""

    def __init__(self, path: Path, setting: dict[str, Any], *, resume: bool):
        """Raises ValueError where the file was made with other settings, or exists without --resume."""
        self.path = path
        self.values: dict[str, Any] = {"setting": setting, "cells": {}}
        if path.is_file():
            if not resume:
                raise ValueError(f"{path} exists; pass --resume to go on with it, or another --out")
            self.values = json.loads(path.read_text(encoding="utf-8"))
            kept = self.values["setting"]
            differing = [k for k in ("max_length", "seed", "fast", "precision") if kept[k] != setting[k]]
            if differing:
                raise ValueError(f"{path} was made with other values of {', '.join(differing)}")

    def cell(self, task: str, method: str) -> dict[str, Any]:
        """The entry of a task and method; what is changed in it is saved by `save`."""
        empty = {"task": task, "method": method, "search": [], "final": None}
        return self.values["cells"].setdefault(f"{task}/{method}", empty)

    def save(self) -> None:
        """Write everything; killed at any moment, the file is the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.values, indent=1) + "\n"
        write_whole(self.path, lambda path: path.write_text(text, encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, and print the table."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        results = Results(options.out, _setting(options), resume=options.resume)
        if not options.table:
            _run(options, results)
    except (OSError, ValueError) as error:
        sys.exit(f"quality: {error}")
    print(table(results.values), searched(results.values), sep="\n\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/ and wnut17/")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with the results")
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, LANGUAGE_MODEL), default=[*TASKS, LANGUAGE_MODEL])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--fast", action="store_true", help="a few rows and one epoch: a smoke test")
    parser.add_argument("--resume", action="store_true", help="go on with the runs that FILE lacks")
    parser.add_argument("--table", action="store_true", help="only print the tables of FILE")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default 1)")
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    options = parser.parse_args(arguments)
    options.resume |= options.table
    return options


def _setting(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_length": MAX_LENGTH,
        "batch_size": BATCH_SIZE,
        "seed": SEED,
        "fast": options.fast,
        "precision": "bfloat16 autocast in training" if options.bf16 else "float32",
        "threads": options.threads,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _run(options: argparse.Namespace, results: Results) -> None:
    tasks: dict[str, Task] = {}
    for name, method in ORDER:
        if name not in options.tasks or method not in options.methods:
            continue
        cell = results.cell(name, method)
        if cell["final"] is not None:
            continue
        if name not in tasks:
            tasks[name] = load(name, options.data, small=options.fast)
        plan = PLANS[name, method]
        run_cell(tasks[name], method, fast(plan) if options.fast else plan, cell, results.save, options)
    if LANGUAGE_MODEL in options.tasks:
        cell = results.cell(LANGUAGE_MODEL, "deep")
        if cell["final"] is None:
            _say(f"{LANGUAGE_MODEL}: a causal language model")
            cell["final"] = language_model.run(options.data, small=options.fast, seed=SEED, bf16=options.bf16)
            results.save()


def load(name: str, data: Path, *, small: bool = False) -> Task:
    """Read and check the three splits of a task; `small` keeps a few rows of each."""
    task_type, suffix = TASKS[name]
    folder = data / name
    train = read_examples(folder / f"train{suffix}", task_type)
    labels = LabelSet.from_examples(train)
    splits = {"train": train}
    for split in ("dev", "test"):
        splits[split] = read_examples(folder / f"{split}{suffix}", task_type, labels=labels)
    if small:
        splits = {split: rows[:64] for split, rows in splits.items()}
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    return Task(TaskCodec(task_type, tokenizer, labels, MAX_LENGTH), splits)


def run_cell(
    task: Task,
    method: str,
    plan: Plan,
    cell: dict[str, Any],
    save: Callable[[], None],
    options: argparse.Namespace,
) -> None:
    """Search, then the final run; each finished run is saved, and a saved one is not run again."""
    metric = metric_for(task.codec.task_type).name
    done = {entry["candidate"] for entry in cell["search"]}
    for candidate in plan.candidates if len(plan.candidates) > 1 else ():
        if candidate.label() in done:
            continue
        rows = spread(task.splits["train"], plan.search_rows)
        run = train_once(task, method, candidate, rows, plan.search_epochs, options)[1]
        _say(f"{cell['task']}/{method} search {candidate.label()}: dev {metric} {run['dev'][metric]:.4f}")
        entry = {"candidate": candidate.label(), **dataclasses.asdict(candidate)}
        cell["search"].append({**entry, "rows": len(rows), **run})
        save()
    chosen = plan.candidates[0]
    if cell["search"]:
        best = max(cell["search"], key=lambda entry: entry["dev"][metric])
        chosen = Candidate(best["learning_rate"], best["num_virtual_tokens"])
    model, run = train_once(task, method, chosen, task.splits["train"], plan.epochs, options)
    test = evaluate(model, task.codec, task.splits["test"], batch_size=2 * BATCH_SIZE)
    _say(f"{cell['task']}/{method} final {chosen.label()}: dev {run['dev'][metric]:.4f}, test {test[metric]:.4f}")
    rows = len(task.splits["train"])
    cell["final"] = {"candidate": chosen.label(), **dataclasses.asdict(chosen), "rows": rows, **run, "test": test}
    save()


def train_once(
    task: Task,
    method: str,
    candidate: Candidate,
    rows: Sequence[dict[str, Any]],
    epochs: int,
    options: argparse.Namespace,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """One training run: the model at its best epoch, and what there is to say about the run."""
    model, trained, total = build(method, candidate, task.codec, rows, minilm_folder(), SEED)
    settings = FitSettings(
        learning_rate=candidate.learning_rate,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        warmup=0.1 if method == "full" else 0.0,
        seed=SEED,
        bf16=options.bf16,
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = fit(
            model,
            task.codec,
            rows,
            task.splits["dev"],
            settings=settings,
            checkpoints=folder,
            title=method if sys.stderr.isatty() else None,
        )
    dev = [record[f"eval_{result.metric}"] for record in result.history if f"eval_{result.metric}" in record]
    return model, {
        "epochs": epochs,
        "dev": dict(result.scores),
        "best_epoch": result.best_epoch,
        "dev_by_epoch": dev,
        "trained_parameters": trained,
        "total_parameters": total,
        "seconds": round(time.perf_counter() - start, 1),
        "tokens_per_second": round(result.tokens_per_second),
    }


def spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows at even distances: files may be sorted."""
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def table(values: dict[str, Any]) -> str:
    """The results as markdown, made of nothing but the JSON."""
    lines = [
        "| task | method | P | learning rate | epoch | trained | dev | test |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = {"SEQ_CLS": "accuracy", "TOKEN_CLS": "entity F1"}
    for task, (task_type, _) in TASKS.items():
        for method in METHODS:
            final = values["cells"].get(f"{task}/{method}", {}).get("final")
            if final is None:
                continue
            metric = metric_for(task_type).name
            share = final["trained_parameters"] / final["total_parameters"]
            lines.append(
                f"| {task} ({shown[task_type]}) | {method} | {final['num_virtual_tokens'] or '–'} "
                f"| {final['learning_rate']:g} | {final['best_epoch']} of {final['epochs']} "
                f"| {final['trained_parameters']:,} ({100 * share:.2f} %) "
                f"| {100 * final['dev'][metric]:.1f} | {100 * final['test'][metric]:.1f} |"
            )
    language = values["cells"].get(f"{LANGUAGE_MODEL}/deep", {}).get("final")
    if language is not None:
        lines += ["", language_model.sentence(language)]
    return "\n".join(lines)


def searched(values: dict[str, Any]) -> str:
    """What each search tried, with the dev score of each candidate in percent, as markdown."""
    lines = ["| task | method | rows, epochs | dev by candidate |", "|---|---|---|---|"]
    for task, (task_type, _) in TASKS.items():
        for method in METHODS:
            runs = values["cells"].get(f"{task}/{method}", {}).get("search", [])
            if runs:
                metric = metric_for(task_type).name
                tried = (f"{run['candidate'].replace('lr=', 'rate ')}: {100 * run['dev'][metric]:.1f}" for run in runs)
                lines.append(f"| {task} | {method} | {runs[0]['rows']}, {runs[0]['epochs']} | {'; '.join(tried)} |")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
