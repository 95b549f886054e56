"""What the card itself reaches, measured in the first seconds of every run: the ceilings that figures stand under."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

# Side of the square product, and bytes of the tensor that is copied.
_SIDE, _BYTES = 8192, 4 * 10**9
_TINY_SIDE, _TINY_BYTES = 128, 4 * 10**5
_ROUNDS = 9


@dataclass(frozen=True)
class Ceiling:
    """What a device has been measured to reach: matrix products of 16-bit random data, and copies.

    Attributes:
        tflops: of an 8192^3 product.
        terabytes_per_second: of a copy on the device, bytes read plus bytes written.
    """

    tflops: float
    terabytes_per_second: float

    def as_dict(self) -> dict[str, float]:
        """The ceilings as JSON values."""
        return asdict(self)


def measure_ceiling(device: torch.device, *, tiny: bool = False) -> Ceiling:
    """Measure both ceilings: medians over a few calls, about two seconds on a card.

    Args:
        tiny: small sizes, which say nothing about the device.
    """
    side, size = (_TINY_SIDE, _TINY_BYTES) if tiny else (_SIDE, _BYTES)
    generator = torch.Generator(device=device).manual_seed(0)
    # Zeros would be multiplied faster: they draw less power.
    left, right = (torch.randn(side, side, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    product = _median_seconds(lambda: torch.mm(left, right, out=out), device)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device)
    return Ceiling(2 * side**3 / product / 1e12, 2 * size / copy / 1e12)


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    times = []
    for _ in range(_ROUNDS):
        if device.type != "cuda":
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
