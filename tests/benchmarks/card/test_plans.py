"""A card's plans as data: what they name exists, what they measure judges the goals, and their time adds up."""

from __future__ import annotations

import fnmatch

import pytest

from benchmarks.attention.cases import kernel_cases, tiny_cases
from benchmarks.attention.providers import all_providers
from benchmarks.card import plans, work
from benchmarks.decode.cases import decode_cases, tiny_decode_cases
from benchmarks.decode.providers import decode_providers
from benchmarks.goals import BEST, KERNEL_GOALS
from benchmarks.step.cases import MEMORY_CELLS, memory_groups, step_groups, tiny_groups
from benchmarks.step.goals import STEP_GOALS
from benchmarks.step.providers import step_providers

PLANS = {"first": plans.first(), **{f"second-{name}": plans.second(name) for name in plans.VARIANTS}}
PHASES = [pytest.param(p, id=f"{name}-{p.name}") for name, plan in PLANS.items() for p in plan.phases]
STEPS = [case for group in step_groups() for case in group.cases]
TINY_STEPS = [case for group in tiny_groups() for case in group.cases]
# Work -> the cells that it chooses from, those of a rehearsal, and the providers.
GRIDS = {
    "kernels": (kernel_cases(), tiny_cases(), all_providers()),
    "compile_kernels": (kernel_cases(), tiny_cases(), all_providers()),
    "steps": (STEPS, TINY_STEPS, step_providers()),
    "compile_steps": (STEPS, TINY_STEPS, step_providers()),
    "compile_ours": ([*STEPS, *decode_cases()], TINY_STEPS, []),
    "memory": ([c for g in memory_groups(MEMORY_CELLS) for c in g.cases], TINY_STEPS, step_providers()),
    "decode": (decode_cases(), tiny_decode_cases(), decode_providers()),
    "compile_decode": (decode_cases(), tiny_decode_cases(), decode_providers()),
}


def _chosen(phase, cases=None):
    """The cells of the real grid that a phase measures."""
    grid = GRIDS[phase.work][0] if cases is None else cases
    patterns = phase.arguments.get("only", ())
    return [case for case in grid if not patterns or any(fnmatch.fnmatch(case.id, p) for p in patterns)]


@pytest.mark.parametrize("phase", PHASES)
def test_what_a_phase_names_exists(phase):
    assert phase.work in work.WORK and phase.limit > 0 and phase.latest > 0
    assert not (phase.timed and phase.beside)
    for arguments, place in ((phase.arguments, 0), (phase.tiny, 1)):
        if phase.work not in GRIDS:
            continue
        grid = [case.id for case in GRIDS[phase.work][place]]
        for pattern in arguments.get("only", ()):
            assert fnmatch.filter(grid, pattern), (place, pattern)
        known = {provider.name for provider in GRIDS[phase.work][2]} | {"ours_tuned"}
        assert not known or set(arguments.get("providers", ())) <= known


@pytest.mark.parametrize("name", PLANS)
def test_phases_have_their_own_names_and_begin_in_order(name):
    plan = PLANS[name]
    names = [phase.name for phase in plan.phases]
    waited_for = [phase.name for phase in plan.phases if not phase.beside]
    assert len(set(names)) == len(names) and names[0] == "start" and waited_for[:2] == ["start", "gates"]
    waited = [phase for phase in plan.phases if not phase.beside]
    # What is compiled beside is done while something runs that is not timed.
    for place, phase in enumerate(plan.phases):
        later = plan.phases[place + 1 :]
        assert not phase.beside or not next(other for other in later if not other.beside).timed
    assert [p.latest for p in waited] == sorted(p.latest for p in waited)
    assert all(phase.latest < plan.seconds for phase in waited)


@pytest.mark.parametrize("name", PLANS)
def test_what_is_timed_was_compiled_before(name):
    gates = next(phase for phase in PLANS[name].phases if phase.work == "gates")
    beside = [pattern for phase in PLANS[name].phases if phase.beside for pattern in phase.arguments["only"]]
    for phase in PLANS[name].phases:
        if phase.work == "kernels":
            assert set(phase.arguments["only"]) <= {*gates.arguments["ahead"], *beside}, phase.name


def test_only_what_measures_time_is_alone():
    for plan in PLANS.values():
        for phase in plan.phases:
            alone = phase.work in ("kernels", "steps", "decode", "memory", "tune", "float8") or phase.name == "offsets"
            assert phase.timed == alone, phase.name
            # Nothing is timed where something is wrong.
            assert not phase.timed or phase.when == plans.GREEN


def test_plans_scale():
    half = PLANS["first"].scaled(225)
    assert half.seconds == 225 and half.red_seconds == 100
    assert [p.limit * 2 for p in half.phases] == pytest.approx([p.limit for p in PLANS["first"].phases])


# A whole compiled Llama fits beside nothing else.
LATER = {"D2", "S8b"}
GOALS = {goal.id: goal for goal in (*KERNEL_GOALS, *STEP_GOALS)}


OURS = {"ours", "ours_graph", "ours_graph_compiled", "ours_compiled"}


def _judges(plan, goal):
    """Whether a phase of a plan times both sides of a goal in one of its cells."""
    for phase in plan.phases:
        if phase.work != goal.suite or phase.arguments.get("profile"):
            continue
        named = set(phase.arguments["providers"])
        ours = bool(named & OURS) if goal.ours == BEST else goal.ours in named
        if ours and goal.peer in named and any(goal.judged(case.as_dict()) for case in _chosen(phase)):
            return True
    return False


# Of PEFT's generate there are figures; eager generation takes the seconds that a compiled one needs.
@pytest.mark.parametrize("name", sorted(GOALS.keys() - LATER - {"D3"}))
def test_the_first_call_judges_a_goal(name):
    assert _judges(PLANS["first"], GOALS[name])


@pytest.mark.parametrize("name", sorted(LATER))
def test_what_the_first_call_leaves_is_judged_by_the_second(name):
    assert _judges(PLANS["second-rest"], GOALS[name])


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant must be one of"):
        plans.second("all")


def test_steps_and_generation_are_compiled_by_the_same_processes(make_context, monkeypatch):
    begun, asked = [], []
    monkeypatch.setattr(work.Compilers, "__enter__", lambda self: begun.append(self) or self)
    monkeypatch.setattr(
        work.Compilers, "warm", lambda self, function, tasks, seconds: asked.append((function, seconds))
    )
    context = make_context()
    work.compile_ours(context, {}, {})
    assert len(begun) == 1 and [function.__name__ for function, _ in asked] == ["compile_cell"]
    # Nothing else is done in this phase.
    assert all(seconds > 0.9 * context.left for _, seconds in asked)
