"""What is compiled ahead is what is measured."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.attention import precompile
from benchmarks.attention import suite as kernels_suite
from benchmarks.attention.cases import case_of, kernel_cases
from benchmarks.attention.precompile import Compilers, code_of, small
from benchmarks.decode.cases import tiny_decode_cases
from benchmarks.step import models as step_models
from benchmarks.step.batches import make_batch, make_prompts
from benchmarks.step.cases import StepCase
from benchmarks.step.providers import Kit, step_providers
from benchmarks.step.verify import run_once
from ptv2_fast.kernels import launch

CPU = torch.device("cpu")


def test_without_cuda_no_process_starts():
    with Compilers(torch.device("cpu")) as compilers:
        compilers.warm(pytest.fail, [("a task ran",)], seconds=1.0)
        assert compilers.pool is None


@pytest.mark.parametrize("case", kernel_cases()[:9], ids=lambda case: case.id)
def test_a_small_case_compiles_to_the_same_code(case):
    less = small(case)
    assert less.B * less.N <= 2 * 128
    assert code_of("ours", less) == code_of("ours", case)
    assert (less.N % 16 == 0) == (case.N % 16 == 0)


def test_unaligned_rows_stay_unaligned():
    assert small(case_of("roberta-large", 3, 129, 17)).N == 129


def test_few_codes_serve_the_whole_grid():
    codes = {code_of("ours", case) for case in kernel_cases()}
    assert len(codes) <= 4 * 2 * 6 + 8


class _BrokenPool:
    def submit(self, *_):
        raise precompile.BrokenProcessPool("gone")

    def shutdown(self, **_):
        pass


def test_a_broken_pool_only_costs_time():
    compilers = Compilers(torch.device("cuda"))
    compilers.pool = _BrokenPool()
    compilers.warm(print, [("x",)], seconds=1.0)
    assert compilers.pool is None


class _SlowFuture:
    def exception(self, timeout):
        waited.append(timeout)
        time.sleep(0.05)
        if timeout <= 0:
            raise precompile.FutureTimeout


class _SlowPool(_BrokenPool):
    def submit(self, *_):
        return _SlowFuture()


waited: list[float] = []


def test_the_time_is_that_of_all_tasks_together():
    waited.clear()
    compilers = Compilers(torch.device("cuda"))
    compilers.pool = _SlowPool()
    compilers.warm(print, [("x",)] * 10, seconds=0.12)
    assert compilers.pool is None and len(waited) < 6 and waited[0] > waited[1]


def test_the_processes_end_after_what_they_compile_last(make_context, monkeypatch):
    order = []
    monkeypatch.setattr(kernels_suite, "_measure_or_say", lambda case, *_: order.append("cell") or {"id": case.id})
    monkeypatch.setattr(kernels_suite, "compile_ahead", lambda *_: order.append("compiled"))
    monkeypatch.setattr(kernels_suite, "line_of", lambda cell: "")
    monkeypatch.setattr(Compilers, "close", lambda self: order.append("closed"))
    kernels_suite.run(make_context(), [])
    assert order[:3] == ["compiled", "closed", "cell"]


def test_no_process_begins_where_all_is_compiled(make_context, monkeypatch):
    begun = []
    monkeypatch.setattr(kernels_suite, "_measure_or_say", lambda case, *_: {"id": case.id})
    monkeypatch.setattr(kernels_suite, "line_of", lambda cell: "")
    monkeypatch.setattr(Compilers, "__enter__", lambda self: begun.append(self) or self)
    for warm in (False, True):
        kernels_suite.run(make_context(), [], warm=warm)
        assert bool(begun) == warm


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
        monkeypatch.setattr(step_models, "_TINY", {**step_models._TINY, "num_hidden_layers": 5})
        monkeypatch.setattr("benchmarks.step.providers.Kit", _interpreted(Kit))
        if ahead:
            precompile.compile_step(case, tiny=True)
        else:
            base = step_models.build_base(case.model, CPU, torch.float32)
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


def test_a_generation_with_a_few_layers_runs():
    precompile.compile_decode(tiny_decode_cases()[0], tiny=True)
