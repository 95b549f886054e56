"""A launch that was made before, made again: without Triton's binder, which asks every argument of every call.

From layer to layer and from step to step only addresses change. The first launch of a kind goes through Triton, which
says what it compiled or found. Everything Triton decided by then stands still or is compared: kernel and constants are
the same objects, and a key holds driver, device, and every tensor's dtype, device and address modulo 16. Later launches
hand their addresses to the same compiled kernel. What the key does not cover goes through Triton every time: hooks,
debugging, instrumentation, other backends than CUDA, other versions than those that were read for this file.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

# Versions whose `JITFunction.run` is known to return the compiled kernel, and to launch it as `launch` does here.
KNOWN_TRITON = ((3, 6), (3, 7), (3, 8), (3, 9))

# What every launch asks of Triton: a product and the sum behind it are one instruction, as the kernels count on and as
# Triton did of itself up to 3.9; from 3.10 on only where it is asked.
ASKED = {"enable_fp_fusion": True}

# What is remembered is bounded: a training run over packed rows has other sizes every step.
MOST_REMEMBERED = 512
_MOST_PLANS = 64

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
# Tensors, None where there is none; or groups of such, each of which is one argument.
Tensors: TypeAlias = Sequence[torch.Tensor | None] | Sequence[tuple[torch.Tensor | None, ...]]


class Constants:
    """The arguments of a launch that are no tensors, kept for all launches that share them; never changed.

    Attributes:
        values: numbers, tuples of integers, compile-time values and Triton's options, by name.
        groups: the classes of NamedTuples that the tensors are handed over in; none where each is an argument.
        plans: how such launches are repeated, by what is compared.
    """

    __slots__ = ("groups", "plans", "values")

    def __init__(self, values: Mapping[str, Any], groups: tuple[type, ...] = ()) -> None:
        self.values = dict(values)
        self.groups = groups
        self.plans: dict[tuple[Any, ...], Plan] = {}

    def arguments(self, kernel: Any, tensors: Tensors) -> dict[str, Any]:
        """All arguments of a launch of `kernel`, by name, and Triton's options: the constants' and `ASKED`."""
        first: Sequence[Any] = tensors
        if self.groups:
            first = [group(*some) for group, some in zip(self.groups, first, strict=True)]
        return {**dict(zip(kernel.arg_names, first, strict=False)), **self.values, **ASKED}


@functools.lru_cache(MOST_REMEMBERED, typed=True)
def constants(**values: Any) -> Constants:
    """The same object for the same values and types; tuples hold integers."""
    return Constants(values)


class Plan(NamedTuple):
    """What repeats a launch.

    Attributes:
        kernel: the kernel it is of.
        compiled: what Triton made of it, kept because the device forgets the code of one that is gone.
        run: its launcher.
        function, metadata: what the launcher has to be given.
        arguments: what it has to be given after the tensors.
        globals: (name, value, namespace) of each constant of a module that was compiled in.
    """

    kernel: Any
    compiled: Any
    run: Any
    function: Any
    metadata: Any
    arguments: tuple[Any, ...]
    globals: tuple[tuple[str, Any, dict[str, Any]], ...]


def remember(memory: dict[_Key, _Value], key: _Key, value: _Value, most: int) -> _Value:
    """Put a value into a memory that is emptied when it is full, and give the value back; threads may do so at once."""
    if len(memory) >= most:
        memory.clear()
    memory[key] = value
    return value


def is_known(version: str) -> bool:
    """Whether launches of this version of Triton can be repeated."""
    return any(version.startswith(f"{major}.{minor}.") for major, minor in KNOWN_TRITON)


_is_known = is_known(triton.__version__)


class Notes:
    """What one thread allocates and launches meanwhile.

    Attributes:
        allocated: memory that nobody has written to yet, kept alive so that no address comes twice.
        launched: (plan, grid, groups of tensors, whether groups are arguments) of each launch.
        active, number: Triton's driver, and the number of its current device, in all of them.
        missed: whether a launch was made of which there is no plan, or on another device than others.
    """

    def __init__(self) -> None:
        self.allocated: list[torch.Tensor] = []
        self.launched: list[tuple[Plan, tuple[int, int, int], Sequence[Any], bool]] = []
        self.active: Any = None
        self.number = 0
        self.missed = False

    def add(self, plan: Plan | None, grid: tuple[int, ...], constants: Constants, tensors: Tensors) -> None:
        """Note a launch that was just made."""
        active = driver.active
        number = active.get_current_device()
        if plan is None or self.launched and (active is not self.active or number != self.number):
            self.missed = True
            return
        self.active, self.number = active, number
        width, height, depth = (*grid, 1, 1)[:3]
        is_grouped = bool(constants.groups)
        self.launched.append((plan, (width, height, depth), tensors if is_grouped else (tensors,), is_grouped))


class _Here(threading.local):
    """The notes that a thread takes, if it does."""

    notes: Notes | None = None


here = _Here()


@contextlib.contextmanager
def noting() -> Iterator[Notes]:
    """Note what this thread allocates and launches."""
    before, here.notes = here.notes, Notes()
    try:
        yield here.notes
    finally:
        here.notes = before


def is_repeatable() -> bool:
    """Whether launches may be made without Triton: its version is known, and nobody looks at them."""
    return _is_known and not _is_watched()


def launch(kernel: Any, grid: tuple[int, ...], constants: Constants, tensors: Tensors) -> None:
    """Launch a kernel on the current device and stream, as `kernel[grid](**constants.arguments(kernel, tensors))` does.

    Args:
        kernel: a `triton.jit` function, interpreted or not, whose first parameters are the tensors.
        grid: one to three numbers of programs, none of them 0.
        constants: all other arguments.
        tensors: tensors, None where there is none; a tuple of them for each of the constants' groups if there are any.
    """
    notes = here.notes
    if not _is_known or type(kernel) is not JITFunction or kernel.pre_run_hooks or _is_watched():
        kernel[grid](**constants.arguments(kernel, tensors))
        if notes is not None:
            notes.missed = True
        return
    active = driver.active
    device = active.get_current_device()
    groups: Sequence[Any] = tensors if constants.groups else (tensors,)
    arguments: list[Any] = []
    kinds: list[Any] = [active, device]
    for group in groups:
        addresses: list[int | None] = []
        for tensor in group:
            if tensor is None:
                addresses.append(None)
                kinds.append(None)
            else:
                address = tensor.data_ptr()
                addresses.append(address)
                kinds += tensor.dtype, tensor.get_device(), address % 16
        arguments.append(tuple(addresses))
    if groups is not tensors:
        arguments = arguments[0]
    key = tuple(kinds)
    plan = constants.plans.get(key)
    if plan is None or plan.kernel is not kernel or _has_changed(plan):
        plan = _plan(kernel, kernel[grid](**constants.arguments(kernel, tensors)), constants, tensors, device)
        if plan is not None:
            remember(constants.plans, key, plan, _MOST_PLANS)
        if notes is not None:
            notes.add(plan, grid, constants, tensors)
        return
    if notes is not None:
        notes.add(plan, grid, constants, tensors)
    width, height, depth = (*grid, 1, 1)[:3]
    plan.run(
        width,
        height,
        depth,
        active.get_current_stream(device),
        plan.function,
        plan.metadata,
        None,
        None,
        None,
        *arguments,
        *plan.arguments,
    )


def _is_watched() -> bool:
    """Whether somebody looks at launches or changes how kernels are compiled."""
    knobs = triton.knobs
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        runtime.debug
        or knobs.compilation.instrumentation_mode
        or runtime.add_stages_inspection_hook is not None
        # An empty chain of hooks does nothing.
        or (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    )


def _plain(value: Any) -> Any:
    """The same without NamedTuples: Triton's launchers unpack a plain tuple several times faster."""
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _has_changed(plan: Plan) -> bool:
    """Whether a constant that was compiled in has another value by now, which Triton refuses."""
    for name, value, namespace in plan.globals:
        if namespace.get(name) is not value:
            return True
    return False


def _plan(kernel: Any, compiled: Any, constants: Constants, tensors: Tensors, device: int) -> Plan | None:
    """How to repeat a launch that Triton has just made with `compiled`; None where it cannot be."""
    if not isinstance(compiled, CompiledKernel) or compiled.metadata.target.backend != "cuda":
        return None
    # Addresses are handed over as they are: nobody asks afterwards whether the device can read them. Where they lie is
    # no matter without a device, to a driver that stands in for one.
    groups: Sequence[Any] = tensors if constants.groups else (tensors,)
    places = {tensor.get_device() for group in groups for tensor in group if tensor is not None}
    if places != {device} and (places != {-1} or torch.cuda.is_initialized()):
        return None
    others = kernel.arg_names[len(tensors) :]
    if not constants.values.keys() >= set(others):
        return None
    used = [(name, namespace.get(name), namespace) for (name, _), (_, namespace) in kernel.used_global_vals.items()]
    # A class of NamedTuples is code, as a helper is: neither has a value that could change.
    used = [one for one in used if not isinstance(one[1], type)]
    return Plan(
        kernel,
        compiled,
        compiled.run,
        compiled.function,
        compiled.packed_metadata,
        tuple(_plain(constants.values[name]) for name in others),
        tuple(used),
    )
