"""The grid: complete, without doubles, telling things first."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import goals
from benchmarks.attention import cases
from benchmarks.attention.cases import case_of
from benchmarks.attention.providers import all_providers

CUDA = torch.device("cuda")


def test_no_cell_appears_twice():
    ids = [case.id for case in cases.kernel_cases()]
    assert len(ids) == len(set(ids))


def test_every_cell_of_the_published_grid_is_there():
    found = {(c.d, c.causal, c.B, c.N, c.P, c.padding, c.direction) for c in cases.kernel_cases() if c.peers == "all"}
    batches = [(64, 128), (32, 512), (8, 2048), (2, 8192)]
    prompts, padding = [8, 20, 64, 128, 512, 2048], [0.0, 0.4]
    directions = ["forward", "backward", "training"]
    wanted = itertools.product([64, 128], [False, True], batches, prompts, padding, directions)
    missing = [w for w in ((d, c, *b, p, pad, way) for d, c, b, p, pad, way in wanted) if w not in found]
    assert not missing


@pytest.mark.parametrize("goal", goals.KERNEL_GOALS, ids=lambda goal: goal.id)
def test_the_first_nine_cells_judge_every_goal(goal):
    providers = {p.name: p for p in all_providers()}
    sides = [providers[goal.ours], providers[goal.peer]]
    judging = [
        case
        for case in cases.kernel_cases()[:9]
        if goal.judged(case.as_dict()) and all(case.peers in p.peers and p.refuses(case, CUDA) is None for p in sides)
    ]
    assert judging, f"{goal.id} would have no figure in a run cut short"


def test_flexattention_compiles_for_few_cells():
    flex = [case for case in cases.kernel_cases() if case.peers == "flex"]
    assert 1 <= len(flex) <= cases.FLEX_CELLS_AT_MOST
    # A compiled backward may not be run twice over one forward.
    assert {case.direction for case in flex} == {"training"}


@pytest.mark.parametrize(("rows", "padding"), [(64, 0.4), (2, 0.4), (1, 0.25), (8, 0.0)])
def test_padding_is_the_share_asked_for(rows, padding):
    case = case_of("roberta-large", rows, 1000, 8, padding=padding)
    assert case.tokens == pytest.approx(rows * 1000 * (1 - padding), rel=2e-3)
    assert min(case.lengths) >= 1
    assert rows == 1 or max(case.lengths) == 1000


@pytest.mark.parametrize(
    ("field", "value"), [("direction", "sideways"), ("peers", "none"), ("dtype", "int8"), ("padding", 0.5)]
)
def test_a_wrong_field_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*got"):
        case_of("tiny", 2, 4, 1, **{field: value})


def test_the_huge_case_passes_the_range_of_32_bits():
    for memory in (80 * 10**9, 141 * 10**9):
        case = cases.huge_case(memory)
        assert case.B * case.H * case.N * case.d > 2**31
        # Queries, output and both gradients, keys and values likewise; and all of it packed beside.
        rows = case.B * case.N * case.d * (4 * case.H + 4 * case.Hkv)
        assert 2 * 2 * rows < memory


@pytest.mark.parametrize(("memory", "large"), [(80 * 10**9, ("q",)), (141 * 10**9, ("q", "k"))])
def test_what_passes_2_to_the_31_fits_the_card(memory, large):
    case = cases.huge_case(memory)
    elements = {"q": case.B * case.H * case.N * case.d, "k": case.B * case.Hkv * case.N * case.d}
    assert tuple(name for name, count in elements.items() if count > 2**31) == large
    # q, k, v and what comes of each, in 16 bits, forward and backward.
    assert 2 * 4 * (elements["q"] + elements["k"]) < memory
