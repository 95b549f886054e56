"""Names of an adapter's files, and those adapters can have: folders' on any system, parts of a state dict's keys."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

# An adapter's two files.
WEIGHTS_NAME = "ptv2_model.safetensors"
CONFIG_NAME = "ptv2_config.json"
# What the usual file systems take as one name.
MAX_NAME_BYTES = 200
# Windows opens devices by these, whatever folder they stand in.
_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"
}


def check_key(name: object) -> None:
    """Refuse a name that cannot be a folder's, or a part of a state dict's keys.

    Raises:
        ValueError: see above.
    """
    fits = (
        isinstance(name, str)
        and 0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES
        and name.isprintable()
        and name == name.strip()
        and not set(name) & set('./\\:*?"<>|')
    )
    if not fits:
        raise ValueError(
            "name must be a printable string that can name a folder, without dots, slashes, or blanks at its ends; "
            f"got {name!r}"
        )
    from torch import nn  # the names of an adapter's files do not wait for it

    # A ModuleDict cannot hold a module under the name of an attribute of its own.
    if hasattr(nn.ModuleDict(), str(name)):
        raise ValueError(f"name must not be an attribute of torch.nn.ModuleDict; got {name!r}")


def check_name(name: object) -> None:
    """Refuse a name for a new adapter: as `check_key`, and what Windows takes for a device.

    Raises:
        ValueError: see above.
    """
    check_key(name)
    if str(name).casefold() in _DEVICES:
        raise ValueError(f"name must be one that folders can have everywhere; {name!r} is a device on Windows")


def namesake(name: str, others: Iterable[str]) -> str | None:
    """The first of other names whose folder would be the same where case or Unicode's forms do not count."""
    return next((other for other in others if _folded(other) == _folded(name)), None)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
