"""What is compiled ahead is what is measured."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.attention import precompile
from benchmarks.attention import suite as kernels_suite
from benchmarks.attention.cases import case_of, kernel_cases
from benchmarks.attention.precompile import Compilers, code_of, small


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
