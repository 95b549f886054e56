"""What a goal is, and those of the kernels as data: which cells judge one, the figure, and what it has to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Cell = Mapping[str, object]

# Stands for whichever configuration of ours is fastest in a cell (or holds least), of those that do the whole work.
BEST = "best of ours"
_NOT_WHOLE = ("ours_p0", "ours_tasks16")


@dataclass(frozen=True)
class Goal:
    """One line of the table of goals.

    Attributes:
        id: as in the table of goals.
        what: what is compared, in words.
        judged: whether a cell counts.
        ours, peer: providers; the figure is ours over peer where `at_most`, else peer over ours. `BEST` may stand for
            ours.
        must, reach: the figure asked of a cell, and the one near the physical limit.
        at_most: smaller is better.
        quantity: the entry of a provider's record that is compared.
        suite: whose cells judge it.
        geomean_must: what the geometric mean over the cells must be besides.
        asked: `must` in words, where it is not a number or two.
    """

    id: str
    what: str
    judged: Callable[[Mapping[str, object]], bool]
    ours: str
    peer: str
    must: Callable[[Mapping[str, object]], float]
    reach: float | Callable[[Mapping[str, object]], float]
    at_most: bool = False
    quantity: str = "ms"
    suite: str = "kernels"
    geomean_must: float | None = None
    asked: str = ""

    def figure(self, cell: Cell) -> float | None:
        """The figure of one cell, None where the cell does not count or one side was not timed."""
        if not self.judged(cell["case"]):
            return None
        name = self.provider(cell)
        if name is None:
            return None
        if self.quantity == "ms":
            ours, peer = comparable(cell, name, self.peer)
        else:
            ours, peer = (cell["peers"].get(one, {}).get(self.quantity) for one in (name, self.peer))
        if not ours or not peer:
            return None
        return ours / peer if self.at_most else peer / ours

    def provider(self, cell: Cell) -> str | None:
        """The provider of ours that is compared in a cell; None where there is none."""
        if self.ours != BEST:
            return self.ours
        return best_of_ours(cell, self.quantity)

    def reach_of(self, case: Mapping[str, object]) -> float:
        """The figure near the physical limit in a cell."""
        return self.reach(case) if callable(self.reach) else self.reach

    def met(self, figure: float, case: Mapping[str, object], bound: float | None = None) -> bool:
        """Whether a figure is what the cell must have (or `bound`)."""
        bound = self.must(case) if bound is None else bound
        return figure <= bound if self.at_most else figure >= bound


def best_of_ours(cell: Cell, quantity: str = "ms") -> str | None:
    """The configuration of ours with the smallest `quantity` in a cell."""
    found = {
        name: entry[quantity]
        for name, entry in cell.get("peers", {}).items()
        if name.startswith("ours") and name not in _NOT_WHOLE and entry.get(quantity)
        and entry["status"] in ("timed", "passed")
    }  # fmt: skip
    return min(found, key=found.get) if found else None


def milliseconds(cell: Cell, name: str) -> float | None:
    """The median of a provider in a cell, None where it was not timed."""
    entry = cell.get("peers", {}).get(name, {})
    return entry.get("ms") if entry.get("status") == "timed" else None


def comparable(cell: Cell, ours: str, peer: str) -> tuple[float | None, float | None]:
    """Medians of ours and a peer that were measured in one way and in the same rounds.

    A peer that was timed after the others has what ours took beside it; with the host's launches for both where one
    could not be replayed.
    """
    entries = [cell.get("peers", {}).get(name, {}) for name in (ours, peer)]
    times = [milliseconds(cell, name) for name in (ours, peer)]
    if len({entry.get("method") for entry in entries}) > 1:
        times = [entry.get("eager_ms") or ms for entry, ms in zip(entries, times, strict=False)]
    return entries[1].get("beside", {}).get(ours, times[0]), times[1]


def _is(direction: str, **wanted) -> Callable[[Mapping[str, object]], bool]:
    """Cells of a direction whose fields are as given; a callable judges its field."""

    def judged(case: Mapping[str, object]) -> bool:
        fields = (check(case[name]) if callable(check) else case[name] == check for name, check in wanted.items())
        return case["direction"] == direction and case["dtype"] == "bf16" and all(fields)

    return judged


def _short_prompt(case: Mapping[str, object]) -> bool:
    return 0 < case["P"] <= case["N"] / 4


def _long(tokens: int) -> bool:
    return tokens >= 512


_TEXT_ONLY = {"causal": False, "padding": 0.0}
_K6 = _is("training", causal=True, padding=0.0)
_K7 = _is("backward")

KERNEL_GOALS = (
    Goal(
        "K1", "forward, d = 64, N ≥ 512, against cuDNN without mask and concat",
        _is("forward", d=64, N=_long, **_TEXT_ONLY), "ours", "cudnn", lambda case: 0.95, 1.05,
    ),
    Goal(
        "K2", "forward, d = 128, N ≥ 512, against cuDNN without mask and concat",
        _is("forward", d=128, N=_long, **_TEXT_ONLY), "ours", "cudnn", lambda case: 0.75, 0.95,
    ),
    Goal(
        "K3", "backward with dK_p and dV_p, against cuDNN without mask and concat",
        _is("backward", **_TEXT_ONLY), "ours", "cudnn",
        lambda case: 0.70 if case["d"] == 64 else 0.60, 0.90,
    ),
    Goal(
        "K4", "forward + backward on real tokens, 40 % padding, against concat + mask + SDPA",
        _is("training", padding=0.4), "ours_packed", "sdpa_user",
        lambda case: 2.0 if case["N"] >= 512 else 1.6, 2.8,
    ),
    Goal(
        "K5a", "forward + backward, against FlexAttention with concat",
        _is("training"), "ours", "flex_concat", lambda case: 1.15, 1.5,
    ),
    Goal(
        "K5b", "forward + backward, against FlexAttention split, merged by log-sum-exp",
        _is("training"), "ours", "flex_split", lambda case: 1.3, 1.8,
    ),
    Goal(
        "K6", "causal + GQA, forward + backward, P ≤ N/4, against masked SDPA (concat not timed)",
        lambda case: _K6(case) and case["Hkv"] < case["H"] and _short_prompt(case),
        "ours", "sdpa_outside", lambda case: 1.4, 1.8,
    ),
    Goal(
        "K7", "backward of the prompt only over the full backward, P ≤ N/4",
        lambda case: _K7(case) and _short_prompt(case),
        "ours_prefix", "ours", lambda case: 0.40, 0.25, at_most=True,
    ),
    Goal(
        "T1", "forward + backward, a batch of 16 tasks over one of one task",
        _is("training"), "ours_bank16", "ours", lambda case: 1.05, 1.02, at_most=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """How a goal stands over some cells; `cells` is 0 where nothing was measured."""

    goal: Goal
    cells: int = 0
    met_cells: int = 0
    reached_cells: int = 0
    geomean: float | None = None
    worst: float | None = None
    worst_cell: str | None = None
    worst_tflops: float | None = None
    worst_provider: str | None = None
    musts: tuple[float, ...] = ()

    @property
    def met(self) -> bool | None:
        """Whether every cell, and their mean, has what it must; None where nothing was measured."""
        if not self.cells:
            return None
        bound = self.goal.geomean_must
        return self.met_cells == self.cells and (bound is None or self.goal.met(self.geomean, {}, bound))


def standing(goal: Goal, cells: Iterable[Cell]) -> Standing:
    """A goal over all cells that judge it; the worst is the one furthest from what it must be.

    Args:
        cells: oldest first. Of a cell that was measured several times the newest counts that has both sides: a ratio is
            taken inside one run.
    """
    figures = ((goal.figure(cell), cell) for cell in cells)
    judged = list({cell["id"]: (figure, cell) for figure, cell in figures if figure is not None}.values())
    if not judged:
        return Standing(goal)

    def margin(pair) -> float:
        figure, cell = pair
        ratio = figure / goal.must(cell["case"])
        return 1 / ratio if goal.at_most else ratio

    worst, worst_cell = min(judged, key=margin)
    return Standing(
        goal,
        cells=len(judged),
        met_cells=sum(goal.met(figure, cell["case"]) for figure, cell in judged),
        reached_cells=sum(goal.met(figure, cell["case"], goal.reach_of(cell["case"])) for figure, cell in judged),
        geomean=math.exp(sum(math.log(figure) for figure, _ in judged) / len(judged)),
        worst=worst,
        worst_cell=worst_cell["id"],
        worst_tflops=worst_cell["peers"][goal.provider(worst_cell)].get("tflops"),
        worst_provider=goal.provider(worst_cell),
        musts=tuple(sorted({goal.must(cell["case"]) for _, cell in judged})),
    )
