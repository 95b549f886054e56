"""What is compiled ahead of steps is what steps launch."""

from __future__ import annotations

import pytest
import torch

from benchmarks.step import models
from benchmarks.step.batches import make_batch, make_prompts
from benchmarks.step.cases import StepCase
from benchmarks.step.precompile import compile_step
from benchmarks.step.providers import Kit, step_providers
from benchmarks.step.verify import run_once
from ptv2_fast.kernels import launch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("model", "peers", "names"),
    [("tiny-bert", "compiled", ["ours_p0"]), ("tiny-bert", "tasks", ["ours_tasks16"]), ("tiny-qwen3", "compiled", [])],
)
def test_a_few_layers_launch_what_a_whole_model_does(model, peers, names, monkeypatch):
    tasks = peers == "tasks"
    case = StepCase(model, 16 if tasks else 3, 5 if tasks else 9, 4, 0.0 if tasks else 0.4, dtype="fp32", peers=peers)

    def launched(ahead):
        """(kernel, tiles and flags) of every launch of one step."""
        seen = set()
        usual = launch.run

        def run(kernel, grid, device, tensors, constants):
            # What is launched does not depend on what was computed: nothing is.
            named = sorted(constants.values.items())
            flags = tuple((k, v) for k, v in named if isinstance(v, bool) or k.startswith("BLOCK"))
            seen.add((kernel.fn.__name__, flags))

        monkeypatch.setattr(launch, "run", run)
        monkeypatch.setattr(models, "_TINY", {**models._TINY, "num_hidden_layers": 5})
        monkeypatch.setattr("benchmarks.step.precompile.Kit", _interpreted(Kit))
        if ahead:
            compile_step(case, tiny=True)
        else:
            base = models.build_base(case.model, CPU, torch.float32)
            kit = Kit(base, make_prompts(base, case.P), case, tiny=True, backend="triton")
            batch = make_batch(base, case.lengths, causal=case.causal, width=case.N)
            for provider in step_providers():
                if provider.name in ("ours", *names):
                    bound = provider.build(kit)
                    run_once(bound, bound.prepare(batch))
        monkeypatch.setattr(launch, "run", usual)
        return seen

    few, all_of_them = launched(True), launched(False)
    assert few and few == all_of_them


def _interpreted(kit):
    return lambda base, prompts, case, *, tiny=False: kit(base, prompts, case, tiny=tiny, backend="triton")
