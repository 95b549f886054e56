"""The random numbers of a device, to draw the same ones again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """Where a device's generator stands."""

    def __init__(self, device: torch.device) -> None:
        """Note where it stands now; nothing waits for the device."""
        self.device = device
        self._state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within this context it draws what it drew from there on; afterwards it stands where it stood."""
        on_cuda = self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if on_cuda else []):
            if on_cuda:
                torch.cuda.set_rng_state(self._state, self.device)
            else:
                torch.set_rng_state(self._state)
            yield
