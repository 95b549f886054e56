"""What of torch.cuda a clock needs, on a CPU: nothing is measured, but every line of the clock is run."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch


class Event:
    """A moment."""

    def __init__(self, enable_timing: bool = False):
        self.at = None

    def record(self, stream=None) -> None:
        """Now."""
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds until another event; only of events that were recorded."""
        return max(1e3 * (other.at - self.at), 1e-3)


class Graph:
    """A graph that counts its replays."""

    replays = 0

    def replay(self) -> None:
        """Count."""
        self.replays += 1


@pytest.fixture
def fake_cuda(monkeypatch):
    """Replace what is asked of torch.cuda; gives the list of graphs that were captured."""
    captured = []

    @contextlib.contextmanager
    def graph(one, **options):
        captured.append(one)
        yield

    fakes = {
        "Event": Event, "CUDAGraph": Graph, "graph": graph, "synchronize": lambda *_: None,
        "current_stream": lambda *_: None, "graph_pool_handle": lambda: (0, 0), "memory_allocated": lambda *_: 100,
        "max_memory_allocated": lambda *_: 350, "reset_peak_memory_stats": lambda *_: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    return captured
