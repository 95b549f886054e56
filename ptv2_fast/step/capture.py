"""What captures calls and replays them: CUDA graphs, and whatever a test puts in their place for another device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

# A size runs this often eagerly, as real steps, before it is captured: kernels load and optimizer states appear.
WARM_UP_STEPS = 2
T = TypeVar("T")


class Capture(Protocol):
    """Turns calls into replays.

    Attributes:
        capturable: optimizers must be told that they are captured, by the `capturable` of their groups.
    """

    capturable: bool

    def warm_up(self, call: Callable[[], T]) -> T:
        """Run a call as it will be captured, but run it."""

    def __call__(self, call: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
        """Capture a call without running it; what comes back runs it and returns the same tensor each time."""


class CudaCapture:
    """Captures calls in CUDA graphs that share one memory pool: their replays never overlap."""

    capturable = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, call: Callable[[], T]) -> T:
        """Run a call on the stream on which it will be captured."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)
        return result

    def __call__(self, call: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
        """Capture a call without running it.

        Raises:
            Exception: whatever the call raises, or the device where it refuses the capture. Nothing has run then, and
                the stream is the one that it was before.
        """
        graph = torch.cuda.CUDAGraph()
        with recording(graph, self._pool, self._stream, torch.cuda.current_stream(self._device)):
            result = call()

        def replay() -> Tensor | None:
            graph.replay()
            return result

        return replay


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream, current: torch.cuda.Stream
) -> Iterator[None]:
    """Within this context a graph records what is launched on a stream.

    A matrix product works in memory that PyTorch keeps for each stream until somebody frees it, as torch.compile does
    in the mode "reduce-overhead": a graph that recorded the address would read and write memory of others from then on.
    So the products in the graph find none and take theirs from the graph's own memory, which lives as long as it does;
    what runs outside afterwards finds none of the graph's.

    Args:
        pool: where the graph's memory comes from.
        current: the stream that is the current one before, and is again where the device refuses the capture.
    """
    # Other threads go on talking to the device, as a DataLoader's that pins memory: in the mode "global" that would
    # break the capture, and raise in that thread.
    mode = "thread_local"
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            yield
    except BaseException:
        # A capture that cannot end leaves its own stream the current one, and the allocator waiting for its end: that
        # refuses to give memory back, until it is told, and raises where it has been told already.
        torch.cuda.set_stream(current)
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(current.device_index, pool)
        raise
    finally:
        torch._C._cuda_clearCublasWorkspaces()


# Device type -> what captures there. This alone decides where steps are captured.
CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaCapture}
