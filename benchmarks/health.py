"""Whether the device can still be used after an error: some errors end a CUDA context, and all that follows fails."""

from __future__ import annotations

import torch


class BrokenContext(Exception):
    """The device's context is unusable: only another process can go on."""


def entry_of(error: BaseException, device: torch.device) -> dict[str, str]:
    """The record of a provider, a check or a cell that raised an error.

    Raises:
        BrokenContext: the device does not answer any more; the message says what the first error was.
    """
    if isinstance(error, BrokenContext):
        raise error
    out_of_memory = is_out_of_memory(error)
    if not out_of_memory and not answers(device):
        raise BrokenContext(reason_of(error)) from error
    return {"status": "out of memory" if out_of_memory else "failed", "reason": reason_of(error)}


def answers(device: torch.device) -> bool:
    """Whether the device still computes: an error that ends a context fails everything after it."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return bool((torch.ones(8, device=device) + 1 == 2).all())
    except Exception:
        return False


def reason_of(error: BaseException) -> str:
    """An error in one line, for the record."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first}"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a device out of memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
