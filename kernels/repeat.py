"""Functions that allocate and launch and do nothing else, called again: the same launches with other addresses.

From layer to layer and from step to step a call differs in addresses alone, and everything else that its host function
works out comes out the same. The first call of a kind runs the function, and what it allocates and launches is noted.
Later calls allocate the results and one buffer for all that is needed in between, and launch. A call of which anything
else was seen runs the function every time: one that is recorded, interpreted or watched, or that copies or clears.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from triton.runtime import driver

from ptv2_fast.kernels import launch, launcher

_Made = tuple[torch.Tensor | None, ...]

# Where each part of the buffer begins: what PyTorch's allocator aligns memory on a GPU to.
_ALIGNMENT = 512


class _Result(NamedTuple):
    """A tensor that a call gives: empty_strided(shape, strides), or a view of empty_strided(*whole) by them."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    whole: tuple[tuple[int, ...], tuple[int, ...]] | None


class _Step(NamedTuple):
    """A launch: what repeats it, its grid, and the addresses that each group of its tensors is made of."""

    plan: launcher.Plan
    grid: tuple[int, int, int]
    picks: tuple[Callable[[list[Any]], tuple[Any, ...]], ...]
    is_grouped: bool


class _Tape(NamedTuple):
    """What repeats a call. Its addresses: None, those of the tensors, of the results, of parts of the buffer.

    Attributes:
        active, number: Triton's driver, and the number of its current device.
        device: of the tensors.
        environment: what `_environment` gave.
        results: what the call gives; None where it gives None.
        parts: where parts of the buffer begin.
        size: bytes of the buffer.
        steps: the launches, in their order.
        kernels: of which they are.
        globals: those of all kernels, as in the plan of a launch.
    """

    active: Any
    number: int
    device: torch.device
    environment: tuple[Any, ...]
    results: tuple[_Result | None, ...]
    parts: tuple[int, ...]
    size: int
    steps: tuple[_Step, ...]
    kernels: tuple[Any, ...]
    globals: tuple[tuple[str, Any, dict[str, Any]], ...]


class Repeated:
    """A function of numbers and tensors that gives tensors, or None in their places; may be its decorator.

    All that the function decides follows from the numbers, and from the shapes, strides, dtypes and devices of tensors
    and which of them are None. What it allocates comes from `kernels.launch`, and only launches write to it. Threads
    may call it at once.
    """

    def __init__(self, function: Callable[..., _Made]) -> None:
        self._function = function
        self._tapes: dict[tuple[Any, ...], _Tape | None] = {}

    def __call__(self, numbers: tuple[Any, ...], *tensors: torch.Tensor | None) -> _Made:
        """What `function(numbers, *tensors)` gives.

        Args:
            numbers: hashable; for those that are equal the function does the same.
        """
        if launch.is_recording():
            return self._function(numbers, *tensors)
        kinds: list[Any] = [numbers]
        addresses: list[int | None] = [None]
        for tensor in tensors:
            if tensor is None:
                kinds.append(None)
                addresses.append(None)
            else:
                address = tensor.data_ptr()
                addresses.append(address)
                kinds += tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), address % 16
        key = tuple(kinds)
        tape = self._tapes.get(key)
        if tape is not None:
            made = _again(tape, addresses)
            if made is not None:
                return made
        elif key in self._tapes:
            return self._function(numbers, *tensors)
        with launcher.noting() as notes:
            result = self._function(numbers, *tensors)
        # Who looks at launches for a while finds them repeated afterwards.
        launcher.remember(self._tapes, key, _tape(notes, tensors, result) or tape, launcher.MOST_REMEMBERED)
        return result


def _environment() -> tuple[Any, ...]:
    """What decides of launches beside their arguments: who tunes or tests replaces it."""
    return launch.choose_config, launch.architecture, launch.target_programs


def _again(tape: _Tape, addresses: list[Any]) -> _Made | None:
    """The call for tensors at other addresses; None where it has to be noted anew."""
    active = driver.active
    if (
        active is not tape.active
        or active.get_current_device() != tape.number
        or _environment() != tape.environment
        or not launcher.is_repeatable()
    ):
        return None
    for kernel in tape.kernels:
        if kernel.pre_run_hooks:
            return None
    for name, value, namespace in tape.globals:
        if namespace.get(name) is not value:
            return None
    made: list[torch.Tensor | None] = []
    misplaced = 0
    for result in tape.results:
        if result is None:
            made.append(None)
            continue
        shape, strides, dtype, whole = result
        if whole is None:
            tensor = torch.empty_strided(shape, strides, dtype=dtype, device=tape.device)
        else:
            tensor = torch.empty_strided(*whole, dtype=dtype, device=tape.device).as_strided(shape, strides)
        address = tensor.data_ptr()
        addresses.append(address)
        misplaced |= address
        made.append(tensor)
    if tape.size:
        buffer = torch.empty(tape.size, dtype=torch.uint8, device=tape.device)
        start = buffer.data_ptr()
        misplaced |= start
        addresses += [start + part for part in tape.parts]
    if misplaced % 16:
        return None
    stream = active.get_current_stream(tape.number)
    for plan, (width, height, depth), picks, is_grouped in tape.steps:
        tensors = [pick(addresses) for pick in picks] if is_grouped else picks[0](addresses)
        plan.run(
            width, height, depth, stream, plan.function, plan.metadata, None, None, None, *tensors, *plan.arguments
        )  # fmt: skip
    return tuple(made)


def _tape(notes: launcher.Notes, tensors: tuple[torch.Tensor | None, ...], result: _Made) -> _Tape | None:
    """What repeats a call that was noted; None where nothing does."""
    if notes.missed or not notes.launched:
        return None
    given = [tensor for tensor in tensors if tensor is not None]
    # Of two tensors at one address it is not known which one a launch was given.
    places = {address: place for place, address in enumerate(map(torch.Tensor.data_ptr, given))}
    if len(places) < len(given):
        return None
    numbers = [place for place, tensor in enumerate(tensors, 1) if tensor is not None]
    found = {address: numbers[place] for address, place in places.items()}
    own = {tensor.data_ptr(): tensor for tensor in notes.allocated}
    if any(address % 16 for address in own):
        return None
    results: list[_Result | None] = []
    count = 1 + len(tensors)
    for tensor in result:
        whole = None if tensor is None else own.pop(tensor.data_ptr(), None)
        if tensor is None:
            results.append(None)
        elif whole is None or whole.dtype != tensor.dtype or not tensor.numel():
            return None
        else:
            is_all = whole.numel() == tensor.numel()
            layout = None if is_all else (tuple(whole.shape), whole.stride())
            results.append(_Result(tuple(tensor.shape), tensor.stride(), tensor.dtype, layout))
            found[tensor.data_ptr()] = count
            count += 1
    # What is left of the memory lies side by side in the buffer.
    starts: dict[int, int] = {}
    size = 0
    for address, tensor in own.items():
        starts[address] = size
        size += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
    parts: list[int] = []
    steps: list[_Step] = []
    for plan, grid, groups, is_grouped in notes.launched:
        picks = []
        for group in groups:
            chosen = []
            for tensor in group:
                if tensor is None:
                    chosen.append(0)
                    continue
                address = tensor.data_ptr()
                if address not in found:
                    start = tensor.untyped_storage().data_ptr()
                    if start not in starts:
                        return None
                    found[address] = count
                    count += 1
                    parts.append(starts[start] + address - start)
                chosen.append(found[address])
            if len(chosen) < 2:
                return None
            picks.append(itemgetter(*chosen))
        steps.append(_Step(plan, grid, tuple(picks), is_grouped))
    plans = [step.plan for step in steps]
    used = {(name, id(namespace)): (name, value, namespace) for p in plans for name, value, namespace in p.globals}
    kernels = tuple({id(plan.kernel): plan.kernel for plan in plans}.values())
    return _Tape(
        notes.active, notes.number, given[0].device, _environment(), tuple(results), tuple(parts), size, tuple(steps),
        kernels, tuple(used.values()),
    )  # fmt: skip
