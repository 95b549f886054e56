"""Which parts of the package a call's time is spent in, by the profiler."""

from __future__ import annotations

import cProfile
import pstats
from collections import defaultdict
from collections.abc import Callable
from typing import Any

# Part -> the ends of the paths of its files, beginnings of folders included; the first that fits counts.
PARTS = {
    "views": ("ptv2_fast/backbone/", "ptv2_fast/families/", "step/layers.py"),
    "padding": ("step/unpad.py",),
    "projections": ("step/fused_projections.py",),
    "hook": ("attention/hook.py", "attention/layer.py", "attention/prompt_batch.py"),
    "checks": ("attention/checks.py", "attention/api.py", "ptv2_fast/inputs/"),
    "autograd": ("attention/triton_backend.py", "attention/triton_layers.py", "autograd/function.py"),
    "launch": ("kernels/",),
    "prompts": ("ptv2_fast/prompts/",),
    "plan": ("step/options.py",),
    "wrapper": ("ptv2_fast/",),
    "module calls": ("torch/nn/",),
    "the model": ("transformers/",),
}


def parts(call: Callable[[], Any], times: int) -> dict[str, float]:
    """Share of each part in the time of `times` calls.

    What is not written in Python counts for the function that called it, and so do operations of PyTorch.
    """
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(times):
        call()
    profiler.disable()
    spent: dict[str, float] = defaultdict(float)
    for (file, _, _), (_, _, own, _, callers) in pstats.Stats(profiler).stats.items():
        if file != "~" or not callers:
            spent[_part(file)] += own
            continue
        for (caller, _, _), (_, _, theirs, _) in callers.items():
            spent[_part(caller)] += theirs
    total = sum(spent.values())
    return {part: round(seconds / total, 3) for part, seconds in sorted(spent.items(), key=lambda pair: -pair[1])}


def _part(file: str) -> str:
    for part, ends in PARTS.items():
        if any(end in file if end.endswith("/") else file.endswith(end) for end in ends):
            return part
    return "others"
