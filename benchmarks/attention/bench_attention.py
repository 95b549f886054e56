"""The headline cells as pytest-benchmark entries: `pytest benchmarks/`, on a CUDA machine."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention.cases import kernel_cases
from benchmarks.attention.inputs import make_inputs
from benchmarks.attention.providers import all_providers
from benchmarks.attention.suite import runner

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

_HEADLINE = 8
_PROVIDERS = (
    "ours", "ours_by_gradient", "ours_packed", "ours_prefix", "ours_bank16", "sdpa_user", "sdpa_outside", "cudnn",
    "flash",
)  # fmt: skip


@pytest.mark.parametrize("case", kernel_cases()[:_HEADLINE], ids=lambda case: case.id)
@pytest.mark.parametrize("name", _PROVIDERS)
def test_attention(benchmark, case, name):
    provider = next(p for p in all_providers() if p.name == name)
    device = torch.device("cuda")
    reason = provider.refuses(case, device)
    if reason is not None:
        pytest.skip(reason)
    call = runner(provider.build(case, make_inputs(case, device)), case)

    def step():
        call()
        torch.cuda.synchronize()

    benchmark.extra_info["case"] = case.as_dict()
    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
