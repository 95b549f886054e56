"""Whether a step computes frozen linear maps in float8, and what is said where it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Float8Found:
    """What float8 can do with the linear maps of a backbone's layers.

    Attributes:
        maps: how many there are.
        served: how many can be computed in float8.
        stay: why -> how many cannot.
        without_backward: how many have none of their own.
        stranded: how many of those cannot be computed in float8 either.
        imitated: the device multiplies the same numbers in float32.
    """

    maps: int
    served: int
    stay: Mapping[str, int]
    without_backward: int = 0
    stranded: int = 0
    imitated: bool = False

    def __str__(self) -> str:
        parts = [f"{self.served} of {self.maps} linear maps"]
        parts += [f"{count} of them {'is' if count == 1 else 'are'} left: {why}" for why, count in self.stay.items()]
        return ", ".join([*parts, *(["in float32 on the CPU"] if self.imitated else [])])


def decide_float8(
    asked: bool | None, found: Float8Found | None, *, training: bool, traced: bool, cannot: str | None
) -> tuple[bool, str]:
    """Whether maps are computed in float8, and why.

    Left at None it is on where maps have no backward of their own: nothing else gives them one.

    Args:
        asked: the switch.
        found: what float8 can do; None where nobody looked.
        traced: inside torch.compile.
        cannot: why nothing can stand in for a map of this model; None where it can.

    Raises:
        ValueError: it is asked for, or needed, where it cannot be; or needed and switched off.
    """
    needed = found is not None and found.without_backward > 0
    wanted = asked or (asked is None and needed)
    if not training or traced:
        return False, ("not training" if not training else "inside torch.compile") if wanted else _why_off(asked)
    if needed and asked is False:
        raise ValueError(
            "step_options.float8 must be None or True where the base's float8 weights quantize their inputs "
            f"(torchao), whose own product has no backward; got False with {found}"
        )
    if not wanted:
        return False, _why_off(asked)
    if cannot is None and found is not None and (not found.served or found.stranded):
        cannot = str(found)
    if cannot is not None and asked:
        raise ValueError(
            "step_options.float8 must be None or False where torch._scaled_mm takes no map of the layers, or leaves "
            f"one without a backward; got True with {cannot}"
        )
    if cannot is not None:
        raise ValueError(
            "base must have no float8 weights that quantize their inputs (torchao) but those of layers in which "
            f"torch._scaled_mm takes every map: its own product has no backward; got {cannot}"
        )
    return True, ("asked for" if asked else "maps without a backward of their own") + (f": {found}" if found else "")


def _why_off(asked: bool | None) -> str:
    return "unless asked for" if asked is None else "asked for"
