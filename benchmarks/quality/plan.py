"""What the quality comparison tries: candidates of each method's search, and lengths of the runs.

The values surround those of earlier trials on SST-2's dev set (deep, P = 64, 1e-2); the grids are
small because the whole comparison has to fit on one CPU core.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.quality.models import Candidate


@dataclass(frozen=True)
class Plan:
    """A method's search on one task, and its final run.

    Attributes:
        candidates: what the search tries; a single one is taken without a search.
        search_rows, search_epochs: training rows of a search run, and its passes over them.
        epochs: passes of the final run over all training rows.
    """

    candidates: tuple[Candidate, ...]
    search_rows: int
    search_epochs: int
    epochs: int


# The order in which cells run: what the comparison stands or falls with comes first.
ORDER = (
    ("sst2", "head"),
    ("sst2", "deep"),
    ("sst2", "full"),
    ("wnut17", "head"),
    ("wnut17", "deep"),
    ("wnut17", "shallow"),
    ("sst2", "shallow"),
    ("wnut17", "full"),
    ("sst2", "prefix"),
    ("wnut17", "prefix"),
)

_HEADS = tuple(Candidate(rate) for rate in (1e-3, 3e-3, 1e-2))


def _grid(*pairs: tuple[int, float]) -> tuple[Candidate, ...]:
    return tuple(Candidate(rate, length) for length, rate in pairs)


PLANS = {
    ("sst2", "head"): Plan(_HEADS, 6920, 10, 15),
    ("sst2", "deep"): Plan(_grid((64, 1e-2), (64, 5e-3), (32, 1e-2)), 1500, 2, 6),
    ("sst2", "shallow"): Plan(_grid((20, 3e-3), (20, 1e-2)), 1500, 2, 3),
    ("sst2", "prefix"): Plan(_grid((64, 1e-2), (20, 1e-2)), 1500, 2, 4),
    ("sst2", "full"): Plan((Candidate(5e-5), Candidate(1e-4)), 1500, 2, 2),
    ("wnut17", "head"): Plan(_HEADS, 3394, 10, 15),
    ("wnut17", "deep"): Plan(_grid((64, 1e-2), (64, 2e-2), (32, 2e-2)), 1200, 2, 7),
    ("wnut17", "shallow"): Plan(_grid((20, 3e-3), (20, 1e-2)), 1200, 2, 3),
    ("wnut17", "prefix"): Plan(_grid((64, 1e-2), (64, 2e-2)), 1200, 2, 4),
    ("wnut17", "full"): Plan((Candidate(1e-4), Candidate(3e-4)), 1200, 2, 3),
}


def fast(plan: Plan) -> Plan:
    """A few rows and a single epoch of everything: whether the code runs, not what it reaches."""
    return Plan(plan.candidates[:2], 64, 1, 1)
