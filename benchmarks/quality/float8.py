"""What float8 costs in quality: deep prompts over MiniLM, trained with `StepOptions(float8=True)` and without.

    python -m benchmarks.quality.float8 --data DIR --out FILE

DIR holds sst2/{train,dev,test}.tsv and wnut17/{train,dev,test}.conll. For each task and seed two trainings: with the
frozen maps as they are, and in float8. The best epoch on part of dev is scored once on test, always by the base as it
is. Beside that, how far the prompts' first gradient lies from the plain one, also with gradients in e5m2. On a CPU
float8's numbers are multiplied in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks import environment
from benchmarks.quality.float8_table import METRICS, SUITE, WAYS, table
from benchmarks.quality.models import Candidate, build
from benchmarks.quality.run import BATCH_SIZE, Task, load, spread
from benchmarks.record import ResultFile
from benchmarks.weights import minilm_folder
from ptv2_fast import StepOptions
from ptv2_fast.backbone import float8_linear
from ptv2_fast.training.fit import FitSettings, fit
from ptv2_fast.training.predict import evaluate


@dataclass(frozen=True)
class Study:
    """How much of a task's data is trained on, and with what: a candidate of the comparison's own search (plan.py)."""

    candidate: Candidate
    rows: int
    epochs: int
    dev_rows: int = 300


# All of both fits into 40 minutes of a core.
STUDIES = {"sst2": Study(Candidate(1e-2, 32), 1500, 3), "wnut17": Study(Candidate(1e-2, 64), 1200, 4)}
SEEDS = (0, 1)
GRADIENT_ROWS = 32
TRAINED = ("plain", "float8")
# Of each way the switch, and the dtype of gradients.
_SWITCHES = dict(
    zip(WAYS, ((None, torch.float8_e4m3fn), (True, torch.float8_e4m3fn), (True, torch.float8_e5m2)), strict=True)
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train everything and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.float8", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/ and wnut17/")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with the results")
    parser.add_argument("--tasks", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--fast", action="store_true", help="a few rows and one epoch: a smoke test")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    command = ["python", "-m", "benchmarks.quality.float8", "--data", "DIR", "--out", options.out.name]
    result = ResultFile(options.out, SUITE, command, environment.describe(torch.device("cpu")))
    for name in options.tasks:
        study = replace(STUDIES[name], epochs=1) if options.fast else STUDIES[name]
        task = load(name, options.data, small=options.fast)
        task.splits["dev"] = spread(task.splits["dev"], study.dev_rows)
        rows = spread(task.splits["train"], study.rows)
        for seed in options.seeds:
            result.put(_gradients(name, task, study, rows, seed))
            for way in TRAINED:
                result.put(_train(name, task, study, rows, seed, way))
    result.finish("complete", finished=environment.now())
    print(table(result.cells, _markdown))


@contextmanager
def _computed(model: Any, way: str) -> Iterator[None]:
    """Train a model this way."""
    on, gradients = _SWITCHES[way]
    model.step_options = StepOptions(float8=on)
    kept, float8_linear.GRADIENTS = float8_linear.GRADIENTS, gradients
    try:
        yield
    finally:
        float8_linear.GRADIENTS = kept


def _train(name: str, task: Task, study: Study, rows: list[dict[str, Any]], seed: int, way: str) -> dict[str, Any]:
    """One training run, scored by the plain base."""
    model, trained, _ = build("deep", study.candidate, task.codec, rows, minilm_folder(), seed)
    settings = FitSettings(study.candidate.learning_rate, epochs=study.epochs, batch_size=BATCH_SIZE, seed=seed)
    start, wall = time.process_time(), time.perf_counter()
    with _computed(model, way), tempfile.TemporaryDirectory() as folder:
        dev = task.splits["dev"]
        result = fit(model, task.codec, rows, dev, settings=settings, checkpoints=folder, title=None)
    test = evaluate(model, task.codec, task.splits["test"], batch_size=2 * BATCH_SIZE)
    print(f"{name} seed {seed} {way}: test {test[METRICS[name]]:.4f}", file=sys.stderr, flush=True)
    return {
        "id": f"{name}-seed{seed}-{way.replace(', ', '-').replace(' ', '-')}",
        "task": name,
        "seed": seed,
        "way": way,
        "num_virtual_tokens": study.candidate.num_virtual_tokens,
        "learning_rate": study.candidate.learning_rate,
        "rows": len(rows),
        "dev_rows": len(task.splits["dev"]),
        "test_rows": len(task.splits["test"]),
        "epochs": study.epochs,
        "best_epoch": result.best_epoch,
        "trained_parameters": trained,
        "dev": dict(result.scores),
        "test": test,
        "cpu_seconds": round(time.process_time() - start, 1),
        "seconds": round(time.perf_counter() - wall, 1),
    }


def _gradients(name: str, task: Task, study: Study, rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """How far the prompts' gradient of the first batch lies from the plain one, as a share of it, in each way."""
    found: dict[str, Tensor] = {}
    for way in WAYS:
        model = build("deep", study.candidate, task.codec, rows, minilm_folder(), seed)[0]
        # Dropout would differ from way to way.
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        batch = task.codec.collator(task.codec.encode(rows[:GRADIENT_ROWS], quiet=True))
        with _computed(model.train(), way):
            model(**batch).loss.backward()
        found[way] = model.adapters["default"].encoder.prompts.grad.double()
    plain = found.pop("plain")
    errors = {way: float((grad - plain).norm() / plain.norm()) for way, grad in found.items()}
    return {
        "id": f"{name}-gradient-seed{seed}", "task": name, "seed": seed, "rows": GRADIENT_ROWS,
        "relative_errors": errors,
    }  # fmt: skip


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["--"] * len(head), *rows])


if __name__ == "__main__":
    main()
