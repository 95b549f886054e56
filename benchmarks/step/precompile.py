"""Our kernels of whole steps, compiled ahead of the clock by `attention.precompile.Compilers`."""

from __future__ import annotations

import torch

from benchmarks.step.batches import make_batch, make_prompts
from benchmarks.step.cases import StepCase
from benchmarks.step.models import build_base
from benchmarks.step.providers import Kit, step_providers
from benchmarks.step.verify import run_once

# The first layer needs no gradient of its text, the last one may have fewer queries, one stands for those between.
LAYERS = 3


def compile_step(case: StepCase, tiny: bool = False) -> None:
    """Take whole steps of ours on a few layers of a model, which launch what all of them do. For a worker."""
    device = torch.device("cpu" if tiny else "cuda")
    base = build_base(case.model, device, case.torch_dtype, dropout=case.dropout, layers=LAYERS)
    kit = Kit(base, make_prompts(base, case.P), case, tiny=tiny)
    batch = make_batch(base, case.lengths, causal=case.causal, width=case.N)
    # Without a prompt and with one for each row kernels are compiled anew.
    names = ("ours", "ours_tasks16", *(() if case.causal else ("ours_p0",)))
    for provider in step_providers():
        if provider.name in names and case.peers in provider.peers:
            bound = provider.build(kit)
            run_once(bound, bound.prepare(batch))
