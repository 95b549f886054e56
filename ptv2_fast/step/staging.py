"""Where a captured pass finds its batch on the device, and how one copy brings it there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ptv2_fast.step.host_batch import Array

# Tensors begin at multiples of so many bytes, as they would if each had been allocated: kernels are compiled for that.
ALIGNMENT = 256
# So many copies may be on their way before the host waits for the oldest.
MOST_IN_FLIGHT = 4


class Event(Protocol):
    """What tells whether a copy has ended."""

    def record(self) -> Any:
        """Note what has been asked of the device so far."""

    def query(self) -> bool:
        """Whether that has ended."""

    def synchronize(self) -> Any:
        """Wait until it has."""


class Staging:
    """A place on the device for batches of one size, filled from pinned memory by one copy that nobody waits for.

    Attributes:
        batch: the batch on the device: views of one allocation, at the same addresses for ever.
    """

    def __init__(self, batch: Any, device: torch.device) -> None:
        """Make room for batches of these sizes; nothing is copied yet.

        Args:
            batch: on the host, packed or padded.
            device: where the batches go.
        """
        self._device = device
        self._layout = {name: (tensor.dtype, tensor.shape) for name, tensor in batch.tensors().items()}
        self._bytes, views = self._allocate(device)
        changes: dict[str, Any] = dict(views)
        self.batch: Any = replace(batch, **changes)
        # The oldest copy first.
        self._sources: deque[_Source] = deque()

    def fill(self, write: Callable[[Mapping[str, Array]], Any]) -> None:
        """Bring a batch of the same sizes to the device, in the order of the current stream.

        The host writes to memory whose last copy has ended; it waits for none, unless many are on their way.

        Args:
            write: puts the batch into an array of one dimension for each of its tensors.
        """
        source = self._free_source()
        write(source.places)
        self._send(source)
        self._sources.append(source)

    def _free_source(self) -> _Source:
        """Pinned memory that no copy reads any more."""
        if self._sources and self._sources[0].copied.query():
            return self._sources.popleft()
        if len(self._sources) < MOST_IN_FLIGHT:
            # The host allocator pins for CUDA alone.
            pinned, views = self._allocate(torch.device("cpu"), pin_memory=self._device.type == "cuda")
            places = {name: view.view(-1).numpy() for name, view in views.items()}
            return _Source(pinned, places, self._event())
        source = self._sources.popleft()
        source.copied.synchronize()
        return source

    def _send(self, source: _Source) -> None:
        """Ask for the copy."""
        self._bytes.copy_(source.bytes, non_blocking=True)
        source.copied.record()

    def _event(self) -> Event:
        return _StreamEvent(self._device) if self._device.type == "cuda" else _Immediate()

    def _allocate(self, device: torch.device, pin_memory: bool = False) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Bytes for the tensors one after the other, and the tensors in them."""
        starts, size = {}, 0
        for name, (dtype, shape) in self._layout.items():
            starts[name] = size
            size += -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        memory = torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pin_memory)
        views = {
            name: memory[starts[name] : starts[name] + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (dtype, shape) in self._layout.items()
        }
        return memory, views


@dataclass(frozen=True)
class _Source:
    """Host memory that a copy reads: its bytes, the arrays in them, and what tells that the copy has ended."""

    bytes: Tensor
    places: Mapping[str, Array]
    copied: Event


class _StreamEvent:
    """An event on whatever stream of a device is the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def query(self) -> bool:
        return self._event.query()

    def synchronize(self) -> None:
        self._event.synchronize()


class _Immediate:
    """A copy that has ended when the call returns, as those on the host do."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass
