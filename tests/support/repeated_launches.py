"""Checks of `kernels/launcher.py` with Triton's real binder, and neither a GPU nor a compiler: run as a program.

Prints a JSON object: the name of each check, and the error it raised or null. Needs torch and triton only, and must run
without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import random
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver

import noted_launches
import repeated_calls
from noted_launches import agree, counted, draw_call, here, noted, recorded, small, small_kernel
from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.prompt_backward import Needs, prompt_attention_backward
from ptv2_fast.kernels.prompt_decode import prompt_attention_decode
from ptv2_fast.kernels.prompt_forward import prompt_attention_forward
from ptv2_fast.kernels.prompt_projection import WeightTable, prompt_projection


def check_the_kernel_is_the_one_that_triton_chooses() -> None:
    """For calls of every form, drawn at random."""
    random.seed(0)
    launches = recorded([draw_call() for _ in range(400)])
    assert len(launches) > 1000 and len({arguments[0].__name__ for arguments in launches}) == 10
    for arguments in launches:
        agree(arguments)


def alike() -> Iterator[Callable[[], Any]]:
    """Calls that differ in one thing from a dense or a packed one, which comes between them."""
    ints, bank = torch.zeros(3, dtype=torch.int32), torch.zeros(1, 2, 20, 32)
    dense = {name: torch.zeros(2, 2, 48, 32) for name in ("q", "k", "v")}
    packed = {name: torch.zeros(96, 2, 32) for name in dense} | {"cu_seqlens": ints}
    common: dict[str, list[Any]] = {
        "prompt_k": [torch.zeros(1, 2, 20, 64)[..., ::2], bank[:, :, :16]], "prompt_v": [bank.transpose(1, 2)[:, :2]],
        "prompt_index": [ints, ints.long()], "prompt_lens": [ints], "prompt_bias": [bank[..., 0], bank[..., 0].half()],
        "causal": [True, 1], "window": [16, 20, True, 1], "softcap": [1, 1.0, True, 20.0, 20], "scale": [1, 1.0, True],
        "seed": [ints.long()],
    }  # fmt: skip
    dropouts = [{"dropout_p": dropout_p, "seed": ints.long()} for dropout_p in (0.5, 0.25)]
    for base, own in (
        (dense, {"q": [dense["q"].transpose(1, 2).contiguous().transpose(1, 2), torch.zeros(2, 4, 48, 32),
                       dense["q"].half()],
                 "k": [torch.zeros(2, 2, 48, 64)[..., ::2], torch.zeros(2, 2, 49, 32)],
                 "v": [torch.zeros(1, 2, 48, 32).expand(2, -1, -1, -1)],
                 "key_mask": [torch.ones(2, 48, dtype=dtype) for dtype in (torch.bool, torch.uint8, torch.int64)]
                 + [torch.ones(2, 64, dtype=torch.bool)[:, :48]],
                 "bias": [torch.zeros(*rows, 48, 48) for rows in ((1, 1), (2, 1), (1, 2), (2, 2))]}),
        (packed, {"cu_seqlens": [torch.zeros(4, dtype=torch.int32)], "max_seqlen": [48, 64],
                  "q": [torch.zeros(2, 96, 32).transpose(0, 1), torch.zeros(80, 2, 32)]}),
    ):  # fmt: skip
        for change in [{}, *dropouts, *({name: value} for name, values in (common | own).items() for value in values)]:
            arguments = {"prompt_k": bank, "prompt_v": bank, **base, **change}
            output = torch.zeros_like(arguments["q"])
            lse = torch.zeros((2, 96) if base is packed else output.shape[:3])
            needs = Needs(True, True, True, "prompt_bias" in change, "bias" in change)
            yield functools.partial(prompt_attention_forward, **arguments)
            yield functools.partial(prompt_attention_backward, output, output=output, lse=lse, needs=needs, **arguments)


def check_what_is_kept_of_a_call_is_what_it_would_be_anew() -> None:
    """Grid and constants of each launch, and their types."""
    calls = [*alike(), *alike()]
    kept, anew = (
        [
            (kernel.__name__, grid, sorted((name, repr(value)) for name, value in constants.values.items()))
            for kernel, grid, constants, _ in recorded(calls, forget)
        ]
        for forget in (False, True)
    )
    assert len(kept) > 500
    for one, other in zip(kept, anew, strict=True):
        assert one == other, (one, other)


def check_nothing_is_somewhere() -> None:
    """Which tensors are absent is part of a kind of launch."""
    kernel, grid, constants, (x, y, mask) = small()
    for tensors in itertools.product((x, None), (y, None), (y, None)):
        if tensors != (None, None, None):
            agree((kernel, grid, constants, tensors))


def check_groups_are_handed_over_as_plain_tuples() -> None:
    """Triton's launchers unpack those several times faster than NamedTuples."""

    def flat(argument: Any) -> Iterator[Any]:
        yield argument
        for part in argument if isinstance(argument, tuple) else ():
            yield from flat(part)

    prompts = [torch.zeros(1, 2, 20, 16) for _ in range(2)]
    q, k, v = (torch.zeros(2, 2, 48, 16) for _ in range(3))
    seen = []
    for _ in range(2):
        ((_, _, _, arguments),) = noted(lambda: prompt_attention_forward(q, k, v, *prompts, scale=0.321))
        seen.append({type(part) for argument in arguments for part in flat(argument) if isinstance(part, tuple)})
    assert len(seen[0]) > 4 and seen[1] == {tuple}, seen


def check_projections_too() -> None:
    """The prompts' keys and values of all layers, twice."""
    weights = [torch.zeros(48, 32) for _ in range(3)]
    for table in (WeightTable(weights), WeightTable(weights, [torch.zeros(48)] * 3)):
        project = functools.partial(prompt_projection, torch.zeros(3, 5, 32), table)
        first = noted(project)
        with counted() as through:
            again = noted(project)
        assert not through and first[0][0] is again[0][0]


def check_numbers_choose_as_triton_does() -> None:
    """Ones, multiples of 16, 64 bits, tuples, flags and options, each in constants of their own."""
    for name, values in {
        "size": (1, True, 16, 17, 2**31, 2**40), "rows": (1, 16, 17, 2**31), "strides": ((1, 1), (16, 1), (17, 1), ()),
        "FLAG": (True, False, 1, None, "text"), "factor": (1.0, 1, 0.0), "num_warps": (2, 8),
    }.items():  # fmt: skip
        for value in values:
            agree(small(**{name: value}))


def check_products_and_sums_are_fused_whatever_triton_does_by_default() -> None:
    """Every kernel of calls of every form asks for it; versions of Triton differ."""
    random.seed(1)
    asked = {}
    for kernel, grid, constants, tensors in recorded([draw_call() for _ in range(100)]):
        for default in (False, True):
            with triton.knobs.language.scope():
                triton.knobs.language.default_fp_fusion = default
                kernel.device_caches.clear()
                constants.plans.clear()
                ((compiled, *_),) = noted(functools.partial(launcher.launch, kernel, grid, constants, tensors))
            asked[kernel.__name__, default] = compiled.options["enable_fp_fusion"]
    assert len(asked) > 16 and all(asked.values()), asked


def check_a_step_is_repeated_whole() -> None:
    """The second call of a kind asks Triton nothing, wherever its tensors are."""
    q, k, v = (torch.zeros(2, 48, 2, 16).transpose(1, 2) for _ in range(3))
    prompts = [torch.zeros(1, 2, 20, 16) for _ in range(2)]
    arguments = {"prompt_bias": torch.zeros(1, 2, 20), "bias": torch.zeros(1, 1, 48, 48), "scale": 0.123}

    def step() -> None:
        o, lse = prompt_attention_forward(q.clone(), k.clone(), v, *prompts, **arguments)
        needs = Needs(True, True, True, True, True)
        prompt_attention_backward(o, q.clone(), k.clone(), v, *prompts, o, lse, needs=needs, **arguments)
        prompt_attention_decode(q[:, :, :1], k, v, *prompts, **arguments | {"bias": None})

    with counted() as through:
        first = noted(step)
        before = len(through)
        again = noted(step)
    assert len(first) == 8 and 0 < before == len(through)
    assert [compiled for compiled, *_ in again] == [compiled for compiled, *_ in first]


def check_device_and_stream_are_those_of_the_moment() -> None:
    """Another stream is another argument, another device another compiled kernel."""
    active, arguments = driver.active, small()
    seen = []
    try:
        for active.device, active.stream in ((0, 7), (0, 8), (1, 8), (0, 9), (1, 9)):
            agree(arguments)
            seen += noted(lambda: launcher.launch(*arguments))
    finally:
        active.device, active.stream = 0, 7
    assert [stream for _, _, stream, _ in seen] == [7, 8, 108, 9, 109]
    assert seen[0][0] is seen[1][0] is seen[3][0] and seen[2][0] is seen[4][0] and seen[0][0] is not seen[2][0]


def check_the_device_is_switched_where_it_is_another() -> None:
    """And only there."""
    active, entered = driver.active, []

    @contextlib.contextmanager
    def switched(device: torch.device) -> Iterator[None]:
        entered.append(device.index)
        before, active.device = active.device, device.index
        yield
        active.device = before

    usual = torch.cuda.device, torch.cuda.current_device
    torch.cuda.device, torch.cuda.current_device = switched, active.get_current_device
    try:
        kernel, grid, constants, tensors = small()
        streams = [
            noted(functools.partial(launch.run, kernel, grid, torch.device("cuda", index), tensors, constants))[0][2]
            for index in (0, 1, 0, 1)
        ]
    finally:
        torch.cuda.device, torch.cuda.current_device = usual
    assert streams == [7, 107, 7, 107] and entered == [1, 1] and active.device == 0


def check_hooks_see_every_launch() -> None:
    """Those of launches, and a kernel's own; with them gone launches are repeated again."""
    arguments, seen = small(), []
    noted(lambda: launcher.launch(*arguments))
    for add, remove in (
        (triton.knobs.runtime.launch_enter_hook.add, triton.knobs.runtime.launch_enter_hook.remove),
        (triton.knobs.runtime.launch_exit_hook.add, triton.knobs.runtime.launch_exit_hook.remove),
        (small_kernel.pre_run_hooks.append, small_kernel.pre_run_hooks.remove),
    ):
        seen.clear()

        def hook(*given: Any, **named: Any) -> None:
            seen.append(given)

        add(hook)
        agree(arguments)
        assert len(seen) == 4
        remove(hook)
        with counted() as through:
            noted(lambda: launcher.launch(*arguments))
        assert not through and len(seen) == 4


def check_debugging_is_tritons() -> None:
    """Asked for while the program runs, it is heeded: another compiled kernel."""
    arguments = small()
    ((usual, *_),) = noted(lambda: launcher.launch(*arguments))
    triton.knobs.runtime.debug = True
    try:
        agree(arguments)
        ((debugged, *_),) = noted(lambda: launcher.launch(*arguments))
    finally:
        triton.knobs.runtime.debug = False
    assert debugged is not usual
    agree(arguments)


def check_a_changed_global_is_refused() -> None:
    """As Triton does."""
    arguments, usual = small(), noted_launches.SCALE
    noted(lambda: launcher.launch(*arguments))
    noted_launches.SCALE = tl.constexpr(3)
    try:
        noted(lambda: launcher.launch(*arguments))
    except RuntimeError as error:
        assert "SCALE" in str(error)
    else:
        raise AssertionError("launched")
    finally:
        noted_launches.SCALE = usual
    agree(arguments)


def check_an_unknown_triton_is_asked_every_time() -> None:
    """Its launches may be made in another way."""
    known = [launcher.is_known(version) for version in ("3.6.0", "3.9.1+git", "3.5.1", "3.10.0", "4.6.0", "3.60.0")]
    assert known == [True, True, False, False, False, False] and launcher._is_known
    arguments = small()
    launcher._is_known = False
    try:
        with counted() as through:
            for _ in range(3):
                assert len(noted(lambda: launcher.launch(*arguments))) == 1
    finally:
        launcher._is_known = True
    assert len(through) == 3 and not arguments[2].plans


def check_what_lies_elsewhere_is_tritons_to_refuse() -> None:
    """A tensor of another device is handed over as a tensor, which a launcher asks for its device."""

    class Elsewhere(torch.Tensor):
        def get_device(self) -> int:
            return 1

    kernel, grid, constants, (x, y, mask) = small()
    usual = torch.cuda.is_initialized
    try:
        with counted() as through:
            for _ in range(2):
                noted(lambda: launcher.launch(kernel, grid, constants, (x, y.as_subclass(Elsewhere), mask)))
            torch.cuda.is_initialized = lambda: True
            for _ in range(2):
                noted(lambda: launcher.launch(kernel, grid, constants, (x, y, mask)))
    finally:
        torch.cuda.is_initialized = usual
    assert len(through) == 4 and not constants.plans


def check_a_compiled_kernel_lives_as_long_as_its_launches() -> None:
    """Triton unloads from the device what nobody holds."""
    arguments = small(size=4711)
    compiled = weakref.ref(noted(lambda: launcher.launch(*arguments))[0][0])
    here.noted = []
    small_kernel.device_caches.clear()
    gc.collect()
    assert compiled() is not None and compiled() is noted(lambda: launcher.launch(*arguments))[0][0]
    here.noted = []
    arguments[2].plans.clear()
    gc.collect()
    assert compiled() is None


def check_threads_do_not_meet() -> None:
    """Eight of them, with constants and memories in common that overflow meanwhile."""
    all_constants = [small(size=size, strides=(16 * size, 1))[2] for size in range(1, 9)]
    usual, errors = launcher._MOST_PLANS, []
    # Triton itself may compile a kernel twice where two threads want it first.
    for constants in all_constants:
        for x, y in itertools.product((0, 1), repeat=2):
            agree((small_kernel, (1,), constants, (torch.zeros(80)[x:], torch.zeros(80)[y:], None)))

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        try:
            for _ in range(300):
                x, y = (torch.zeros(80)[chosen.choice((0, 1, 2, 3)) :] for _ in range(2))
                agree((small_kernel, (chosen.randint(1, 9),), chosen.choice(all_constants), (x, y, None)))
        except BaseException as error:
            errors.append(error)

    launcher._MOST_PLANS = 3
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        launcher._MOST_PLANS = usual
        sys.setswitchinterval(0.005)
    if errors:
        raise errors[0]
    assert all(len(constants.plans) <= 3 + 8 for constants in all_constants)


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def main() -> None:
    """Run every check."""
    errors = {}
    for name, check in {**CHECKS, **repeated_calls.CHECKS}.items():
        try:
            check()
            errors[name] = None
        except Exception:
            errors[name] = traceback.format_exc()
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
