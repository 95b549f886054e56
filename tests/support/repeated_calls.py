"""Checks of `kernels/repeat.py` on top of `noted_launches.py`; run by `repeated_launches.py`, with its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver

import noted_launches
from noted_launches import draw, draw_heads, noted, small
from ptv2_fast.attention import triton_backend, triton_layers
from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.repeat import Repeated

_Call = tuple[Callable[..., Any], tuple[Any, ...], list[Any]]
_LAYER = triton_layers._differentiated._function


def _draw() -> list[_Call]:
    """What eager attention launches: a forward, perhaps of few queries, its backward, and that of a model's layer."""
    dtype, form = random.choice((torch.float16, torch.float32)), random.choice(("dense", "packed", "decode"))
    rows, kv_heads, heads = 3, 2, random.choice((2, 4))
    packed, few = form == "packed", form == "decode"
    tokens = 5 if few else random.choice((17, 48))
    length, entries = random.choice((5, 16)), random.choice((1, 3))
    given = [draw_heads(packed, rows, count, tokens, 16, dtype) for count in (heads, kv_heads, kv_heads)]
    prompts = [draw((entries, kv_heads, length, 16), dtype) for _ in range(2)]
    dropout_p = 0.0 if few else random.choice((0.0, 0.1))
    rest = [
        draw((entries, heads, length), dtype) if random.random() < 0.5 else None,
        None,  # a bias of the text
        draw((rows, tokens), torch.bool) if not packed and random.random() < 0.5 else None,
        draw((rows + 1,), torch.int32) if packed else None,
        draw((rows,), torch.int64) if entries > 1 else None,
        draw((entries,), torch.int32) if random.random() < 0.5 else None,
        draw((1,), torch.int64) if dropout_p else None,
    ]
    numbers = (None, random.random() < 0.5, random.choice((None, 7)), random.choice((None, 20.0)), 0.25, dropout_p)
    tensors = [*given, *prompts, *rest]
    calls: list[_Call] = [(triton_backend._attended, numbers, tensors)]
    output, lse = triton_backend._attended(numbers, *tensors)
    of_bias = rest[0] is not None and random.random() < 0.7
    needs = (*(random.random() < 0.7 for _ in range(5)), of_bias, False)
    if any(needs):
        saved = [draw_heads(packed, rows, heads, tokens, 16, dtype), *tensors[:6], output, lse, *tensors[6:]]
        calls.append((triton_backend._differentiated, (needs, numbers), saved))
        needs = (*random.choice((needs[:3], (True,) * 3)), *needs[3:])
        order = random.choice((None, tuple(random.sample(range(3), 3)))) if all(needs[:3]) else None
        calls.append((_LAYER, (numbers, needs, order), _of_layer(saved, packed)))
    return calls


def _of_layer(saved: list[Any], packed: bool) -> list[Any]:
    """What a backward reads, laid out and in the order in which a layer saved it."""
    grad, q, k, v, *prompts, output, lse = saved[:9]
    if packed:
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
    grad, output = (x[None] if packed else x.transpose(1, 2) for x in (grad, output))
    return [grad, q, k, v, *prompts, *saved[9:], output, lse]


def _moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor of the same kind elsewhere, as far beside a multiple of 16."""
    if tensor is None:
        return None
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    return torch.zeros(reach + offset, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride(), offset)


def _pairs(ours: Any, theirs: Any) -> list[tuple[int, int]]:
    """The numbers in which two launches differ."""
    if isinstance(ours, (tuple, list)):
        assert len(ours) == len(theirs)
        return [pair for one, other in zip(ours, theirs, strict=True) for pair in _pairs(one, other)]
    return [] if ours == theirs and type(ours) is type(theirs) else [(ours, theirs)]


def _agree(again: Repeated, function: Callable[..., Any], numbers: Any, tensors: list[Any]) -> None:
    """A call makes the launches of its function, and what it allocates does not overlap."""
    made: list[Any] = []
    ours = noted(lambda: made.append(again(numbers, *tensors)))
    with launcher.noting() as notes:
        theirs = noted(lambda: made.append(function(numbers, *tensors)))
    assert len(ours) == len(theirs) > 0
    places: dict[int, int] = {}
    for (compiled, *one), (other_compiled, *other) in zip(ours, theirs, strict=True):
        assert compiled is other_compiled
        for here, there in _pairs(one, other):
            assert places.setdefault(here, there) == there, "one address for two"
    homes: set[tuple[int, int]] = set()
    for one, other in zip(*made, strict=True):
        if other is None:
            assert one is None
            continue
        homes.add((one.untyped_storage().data_ptr(), other.untyped_storage().data_ptr()))
        assert one.storage_offset() == other.storage_offset()
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert places[one.data_ptr()] == other.data_ptr()
    assert len({here for here, _ in homes}) == len({there for _, there in homes}) == len(homes), (
        "other memory is shared"
    )
    # How many bytes lie from each address on.
    ends = [(own.data_ptr(), own.data_ptr() + own.untyped_storage().nbytes()) for own in notes.allocated]
    begins = {begin: here for here, there in places.items() for begin, end in ends if there == begin}
    spans = sorted((here, here + end - begin) for begin, end in ends if (here := begins.get(begin)) is not None)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False)), "memory overlaps"


def check_a_repeated_call_launches_what_its_function_does() -> None:
    """For calls of every form, drawn at random, wherever their tensors are."""
    random.seed(2)
    for _ in range(60):
        for function, numbers, tensors in _draw():
            runs: list[Any] = []

            def counting(*given: Any, function=function, runs=runs) -> Any:
                runs.append(given)
                return function(*given)

            again = Repeated(counting)
            again(numbers, *tensors)
            for _ in range(2):
                _agree(again, function, numbers, list(map(_moved, tensors)))
            assert len(runs) == 1, (function, numbers)


def check_results_may_lie_in_one_memory() -> None:
    """Also where another comes between them."""

    def shares(numbers: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kernel, grid, constants, _ = small()
        both, other = launch.allocate((128,), x.dtype, x.device), launch.allocate((64,), x.dtype, x.device)
        made = both[64:], other, both[:64]
        for one in made:
            launch.run(kernel, grid, x.device, (x, one, None), constants)
        return made

    again, x = Repeated(shares), torch.zeros(64)
    noted(lambda: again(0, x))
    _agree(again, shares, 0, [x])


def _causal_or_not(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """The numbers of another call of the same tensors; backward has them beside what it is asked for."""
    if len(numbers) == 6:
        return numbers[0], not numbers[1], *numbers[2:]
    return tuple(_causal_or_not(x) if isinstance(x, tuple) and len(x) == 6 else x for x in numbers)


def _in_another_order(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """The numbers of a layer's backward whose gradients lie otherwise; those of other calls as they are."""
    if len(numbers) != 3 or not all(numbers[1][:3]):
        return numbers
    return *numbers[:2], (2, 1, 0) if numbers[2] is None else None


def _elsewhere_and_wider(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the same shape: one whose rows are further apart, and one that begins beside a multiple of 16."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 16, dtype=tensor.dtype)
    flat = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    return [wide[..., : tensor.shape[-1]], flat[1:].view(tensor.shape)]


def _in_float32(tensors: list[Any]) -> list[Any]:
    """A call's tensors, those of 16 bits in 32 and with the strides that they had."""
    return [_moved_as(x, torch.float32) if x is not None and x.dtype == torch.float16 else x for x in tensors]


def _moved_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.zeros(reach, dtype=dtype).as_strided(tensor.shape, tensor.stride())


def _with_shorter_prompts(function: Callable[..., Any], tensors: list[Any]) -> list[Any]:
    """A call's tensors with a token less in every prompt, strides as they were."""
    place = 3 if function is triton_backend._attended else 4
    keys, values, bias = tensors[place : place + 3]
    prompts = [keys[:, :, :-1], values[:, :, :-1], None if bias is None else bias[..., :-1]]
    return [*tensors[:place], *prompts, *tensors[place + 3 :]]


def check_calls_that_differ_in_one_thing_are_not_taken_for_one_another() -> None:
    """Calls of every form share one memory, as they do where attention is served."""
    random.seed(3)
    shared: dict[Callable[..., Any], Repeated] = {}
    for _ in range(12):
        for function, numbers, (first, *others) in _draw():
            again = shared.setdefault(function, Repeated(function))
            usual = (numbers, first)
            alike = [(numbers, one) for one in _elsewhere_and_wider(first)]
            others_of_it = [(change(numbers), first) for change in (_causal_or_not, _in_another_order)]
            for own, tensor in (usual, *others_of_it, *alike, usual):
                again(own, tensor, *others)
                _agree(again, function, own, list(map(_moved, (tensor, *others))))
            for changed in (_in_float32([first, *others]), _with_shorter_prompts(function, [first, *others])):
                again(numbers, *changed)
                _agree(again, function, numbers, list(map(_moved, changed)))
    assert len(shared) == 3


def _small(numbers: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
    kernel, grid, constants, _ = small()
    y = launch.allocate((64,), x.dtype, x.device)
    launch.run(kernel, grid, x.device, (x, y, None), constants)
    return (y,)


def _runs(call: Callable[..., Any], change: Callable[[], Any], back: Callable[[], Any]) -> int:
    """How often a function that was repeated before runs after a change."""
    count = 0

    def counting(*given: Any) -> Any:
        nonlocal count
        count += 1
        return call(*given)

    again, x = Repeated(counting), torch.zeros(64)
    for _ in range(3):
        noted(lambda: again(0, x))
    assert count == 1
    change()
    try:
        noted(lambda: again(0, x))
    finally:
        back()
    before = count
    noted(lambda: [again(0, x), again(0, x)])
    assert count - before < 2, "not repeated any more"
    return before


def check_a_call_is_noted_anew_where_something_changed() -> None:
    """The device, the choice of tiles, hooks of launches and of kernels."""
    active, usual, hook = driver.active, launch.choose_config, lambda *given, **named: None
    hooks, own = triton.knobs.runtime.launch_enter_hook, noted_launches.small_kernel.pre_run_hooks
    for change, back in (
        (lambda: setattr(active, "device", 1), lambda: setattr(active, "device", 0)),
        (lambda: setattr(launch, "choose_config", lambda *given: usual(*given)),
         lambda: setattr(launch, "choose_config", usual)),
        (lambda: hooks.add(hook), lambda: hooks.remove(hook)),
        (lambda: own.append(hook), lambda: own.remove(hook)),
    ):  # fmt: skip
        assert _runs(_small, change, back) == 2
    assert _runs(_small, lambda: None, lambda: None) == 1


def check_a_repeated_call_refuses_a_changed_global() -> None:
    """As Triton does."""
    again, x, usual = Repeated(_small), torch.zeros(64), noted_launches.SCALE
    noted(lambda: [again(0, x), again(0, x)])
    noted_launches.SCALE = tl.constexpr(3)
    try:
        noted(lambda: again(0, x))
    except RuntimeError as error:
        assert "SCALE" in str(error)
    else:
        raise AssertionError("launched")
    finally:
        noted_launches.SCALE = usual


def check_what_does_more_than_allocate_and_launch_runs_every_time() -> None:
    """Memory that is not fresh, results that were made otherwise or are written to from their middle on, two tensors at
    one place, recording."""

    def clears(numbers: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        kernel, grid, constants, _ = small()
        y = torch.zeros(64)
        launch.run(kernel, grid, x.device, (x, y, None), constants)
        return (launch.allocate((64,), x.dtype, x.device),)

    def adds(numbers: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (_small(numbers, x)[0] + 1,)

    def halves(numbers: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        kernel, grid, constants, _ = small()
        y = launch.allocate((128,), x.dtype, x.device)
        launch.run(kernel, grid, x.device, (x, y[64:], None), constants)
        return (y,)

    def twice(numbers: Any, x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        return _small(numbers, x)

    x = torch.zeros(64)
    for function, tensors in ((clears, (x,)), (adds, (x,)), (halves, (x,)), (twice, (x, x[:32]))):
        runs: list[Any] = []
        again = Repeated(lambda *given, function=function, runs=runs: runs.append(given) or function(*given))
        noted(lambda again=again, tensors=tensors: [again(0, *tensors) for _ in range(3)])
        assert len(runs) == 3, function
    again = Repeated(_small)
    noted(lambda: [again(0, x), again(0, x)])
    with launch.record(90) as launches:
        assert not noted(lambda: again(0, x))
    assert len(launches) == 1


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}
