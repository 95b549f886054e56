"""Functions that allocate and launch and do nothing else, called again: the same launches with other addresses.

From layer to layer and from step to step a call differs in addresses alone, and everything else that its host function
works out comes out the same. The first call of a kind runs the function, and what it allocates and launches is noted.
Later calls allocate the results and one buffer for all that is needed in between, and launch. A call of which anything
else was seen runs the function every time: one that is recorded, interpreted or watched, or that copies or clears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from triton.runtime import driver

from ptv2_fast.kernels import launch, launcher

# Tensors, or None in their places.
_Made = tuple[Any, ...]

# Where each part of the buffer begins: what PyTorch's allocator aligns memory on a GPU to.
_ALIGNMENT = 512


class _Memory(NamedTuple):
    """What `torch.empty_strided` is given."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Result(NamedTuple):
    """A tensor that a call gives: the tape's `memory[place]`, or a view of it by shape, strides and offset."""

    place: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None


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
        memory: what the results lie in, several in the same perhaps, in the order in which they need it.
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
    memory: tuple[_Memory, ...]
    results: tuple[_Result | None, ...]
    parts: tuple[int, ...]
    size: int
    steps: tuple[_Step, ...]
    kernels: tuple[Any, ...]
    globals: tuple[tuple[str, Any, dict[str, Any]], ...]


class Repeated:
    """A function of numbers and tensors that gives tensors, or None in their places; may be its decorator.

    All that the function decides follows from the numbers, and from the shapes, strides, dtypes and devices of tensors
    and which of them are None. What it allocates comes from `kernels.launch`, and only launches write to it. Of the
    tensors it launches views that begin where they do: one that began further on could be taken for another tensor
    that lies there, as queries, keys and values of one buffer do. Threads may call it at once.
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
        # What decides of launches beside their arguments: who tunes or tests replaces it.
        kinds: list[Any] = [numbers, launch.choose_config, launch.architecture, launch.target_programs]
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


def _again(tape: _Tape, addresses: list[Any]) -> _Made | None:
    """The call for tensors at other addresses; None where it has to be noted anew."""
    active = driver.active
    if active is not tape.active or active.get_current_device() != tape.number or not launcher.is_repeatable():
        return None
    for kernel in tape.kernels:
        if kernel.pre_run_hooks:
            return None
    for name, value, namespace in tape.globals:
        if namespace.get(name) is not value:
            return None
    memory: list[torch.Tensor] = []
    made: list[torch.Tensor | None] = []
    misplaced = 0
    for result in tape.results:
        if result is None:
            made.append(None)
            continue
        place, view = result
        if place == len(memory):
            shape, strides, dtype = tape.memory[place]
            memory.append(torch.empty_strided(shape, strides, dtype=dtype, device=tape.device))
        tensor = memory[place] if view is None else memory[place].as_strided(*view)
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


def _tape(notes: launcher.Notes, tensors: tuple[torch.Tensor | None, ...], made: _Made) -> _Tape | None:
    """What repeats a call that was noted; None where nothing does."""
    if notes.missed or not notes.launched:
        return None
    present = [(place, tensor) for place, tensor in enumerate(tensors, 1) if tensor is not None]
    places = {tensor.data_ptr(): place for place, tensor in present}
    own = {tensor.data_ptr(): tensor for tensor in notes.allocated}
    # Of two tensors at one address it is not known which one a launch was given.
    if len(places) < len(present) or any(address % 16 for address in own):
        return None
    laid_out = _results(made, own)
    if laid_out is None:
        return None
    memory, results = laid_out
    count = 1 + len(tensors)
    for tensor in made:
        if tensor is None:
            continue
        places[tensor.data_ptr()] = count
        own.pop(tensor.untyped_storage().data_ptr(), None)
        count += 1
    # What is left of the memory lies side by side in the buffer.
    starts: dict[int, int] = {}
    size = 0
    for address, tensor in own.items():
        starts[address] = size
        size += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
    parts: list[int] = []
    steps = []
    for plan, grid, groups, is_grouped in notes.launched:
        picks = [_pick(group, places, starts, parts, count) for group in groups]
        if None in picks:
            return None
        steps.append(_Step(plan, grid, tuple(filter(None, picks)), is_grouped))
    plans = [step.plan for step in steps]
    used = {(name, id(namespace)): (name, value, namespace) for p in plans for name, value, namespace in p.globals}
    kernels = tuple({id(plan.kernel): plan.kernel for plan in plans}.values())
    return _Tape(
        notes.active, notes.number, present[0][1].device, memory, results, tuple(parts), size, tuple(steps), kernels,
        tuple(used.values()),
    )  # fmt: skip


def _results(
    made: _Made, own: Mapping[int, torch.Tensor]
) -> tuple[tuple[_Memory, ...], tuple[_Result | None, ...]] | None:
    """How to allocate what a call gives; None where a tensor does not lie in fresh memory of its dtype.

    Args:
        own: what was allocated, by its address.
    """
    homes = [None if tensor is None else tensor.untyped_storage().data_ptr() for tensor in made]
    memory: dict[int, _Memory] = {}
    results: list[_Result | None] = []
    for tensor, home in zip(made, homes, strict=True):
        if home is None:
            results.append(None)
            continue
        whole = own.get(home)
        if whole is None or whole.dtype != tensor.dtype or not tensor.numel():
            return None
        shape, strides, view = tuple(tensor.shape), tensor.stride(), None
        if whole.numel() != tensor.numel():
            view = (shape, strides, tensor.storage_offset())
            shape, strides = tuple(whole.shape), whole.stride()
        memory.setdefault(home, _Memory(shape, strides, tensor.dtype))
        results.append(_Result(list(memory).index(home), view))
    return tuple(memory.values()), tuple(results)


def _pick(
    group: Any, places: dict[int, int], starts: Mapping[int, int], parts: list[int], first: int
) -> Callable[[list[Any]], tuple[Any, ...]] | None:
    """What picks the addresses of a group of tensors; None where one lies in memory that is not known.

    Args:
        places: address -> its place among the addresses; those of parts are added.
        starts: where memory was allocated -> where it begins in the buffer.
        parts: where parts of the buffer begin, which are added too; the first has the place `first`.
    """
    chosen = []
    for tensor in group:
        if tensor is None:
            chosen.append(0)
            continue
        address = tensor.data_ptr()
        if address not in places:
            start = tensor.untyped_storage().data_ptr()
            if start not in starts:
                return None
            places[address] = first + len(parts)
            parts.append(starts[start] + address - start)
        chosen.append(places[address])
    return itemgetter(*chosen) if len(chosen) > 1 else None
