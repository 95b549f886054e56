"""Where the command line computes: a word that is checked before torch is there, and the device that it names."""

from __future__ import annotations

import os
import re
from typing import Any

_DEVICE = re.compile(r"cpu|mps|cuda(?::(\d{1,4}))?")


def choose(device: str | None) -> None:
    """Let torch, which has not looked at the devices yet, see the CUDA device alone that is named.

    It is the first one then, which is where Trainer computes; of several that it sees it would take all.

    Raises:
        ValueError: the word names no device.
    """
    named = _DEVICE.fullmatch(device) if device is not None else None
    if device is not None and named is None:
        raise ValueError(f"--device must be cpu, cuda, cuda:<number> or mps; got {device!r}")
    if named is None or not named[0].startswith("cuda"):
        return
    number = int(named[1] or 0)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible and number >= len(visible):
        raise ValueError(f"--device {device} is not there: CUDA_VISIBLE_DEVICES is {','.join(visible)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if visible else str(number)


def device_of(device: str | None) -> Any:
    """The torch device of a word that `choose` has taken; without one the first CUDA device, or the CPU.

    Raises:
        ValueError: this machine, or this build of torch, has none such.
    """
    import torch

    cuda = torch.cuda.is_available()
    there = {"cpu": True, "cuda": cuda, "mps": torch.backends.mps.is_available()}
    kind = (device or ("cuda" if cuda else "cpu")).partition(":")[0]
    if not there[kind]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise ValueError(f"--device {device} is not there: torch {torch.__version__} sees {found}")
    return torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
