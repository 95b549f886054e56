"""What is compiled ahead is what is measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks import precompile
from benchmarks.cases import case_of, kernel_cases
from benchmarks.precompile import Compilers, code_of, small


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
