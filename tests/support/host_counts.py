"""What a layer costs the host, in launches, operations and calls of Python functions: run as a program.

Prints a JSON object: case -> provider -> what one layer adds, and what a step has besides. Must run without
TRITON_INTERPRET.
"""

from __future__ import annotations

import json

import torch

from benchmarks.host import driver
from benchmarks.host.cases import HostCase
from benchmarks.host.counts import operations, python_calls
from benchmarks.host.providers import NEW_TOKENS, calls_of

CASES = {
    f"{kind}-{model}-{injection}": (kind, f"tiny-{model}", injection)
    for kind, model, injection in (
        ("step", "bert", "deep"), ("step", "bert", "prefix"), ("step", "llama", "deep"), ("step", "llama", "prefix"),
        ("token", "llama", "deep"), ("tasks", "bert", "deep"), ("tasks", "llama", "prefix"),
        ("cpu-eval", "bert", "deep"), ("cpu-eval", "llama", "prefix"),
        ("cpu-step", "bert", "prefix"), ("cpu-step", "llama", "deep"),
    )
}  # fmt: skip
DEPTHS = (1, 3)


def counted(case: HostCase, made) -> dict[str, list[int]]:
    """Of each provider: launches, operations, calls of Python functions; of a generation those of one more token."""
    calls = calls_of(case)
    found = {}
    for name, call in calls.items():
        for _ in range(2):
            call()
        before = made.launches
        count = operations(call)
        found[name] = [made.launches - before, count, python_calls(call)]
    if case.kind != "token":
        return found
    names = dict.fromkeys(key.split("/")[0] for key in found)
    pairs = {name: zip(found[f"{name}/1"], found[f"{name}/{1 + NEW_TOKENS}"], strict=True) for name in names}
    return {name: [(long - short) / NEW_TOKENS for short, long in pair] for name, pair in pairs.items()}


def main() -> None:
    """Count every case."""
    torch.set_num_threads(1)
    made = driver.install()
    results = {}
    for name, (kind, model, injection) in CASES.items():
        few, many = (counted(HostCase(kind, model, depth, injection, 0.4), made) for depth in DEPTHS)
        results[name] = {
            who: {
                what: {"layer": (many[who][i] - few[who][i]) / 2, "besides": (3 * few[who][i] - many[who][i]) / 2}
                for i, what in enumerate(("launches", "operations", "calls"))
            }
            for who in few
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
