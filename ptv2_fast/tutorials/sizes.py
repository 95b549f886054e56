"""What the tutorials' classes refuse before anything is made."""

from __future__ import annotations


def check_sizes(**sizes: object) -> None:
    """Refuse sizes that are no positive integers.

    Raises:
        ValueError: the message names the argument.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer; got {size!r}")
