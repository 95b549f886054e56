"""Launches of `kernels/launcher.py` without a device: a driver that only notes them, and calls drawn at random.

Importing it makes that driver Triton's. Needs torch and triton only, and must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ptv2_fast.kernels import launch, launcher, problem
from ptv2_fast.kernels.prompt_backward import Needs, prompt_attention_backward
from ptv2_fast.kernels.prompt_decode import prompt_attention_decode
from ptv2_fast.kernels.prompt_forward import prompt_attention_forward

TARGET = GPUTarget("cuda", 90, 32)
SCALE = tl.constexpr(2)
here = threading.local()


class Driver:
    """A driver with a current device and a current stream."""

    device, stream = 0, 7

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 100 * device

    def get_current_target(self) -> GPUTarget:
        return TARGET


class Compiled(CompiledKernel):
    """What Triton keeps for one key; a run is noted."""

    def __init__(self, src: Any, options: dict[str, Any], **_: Any) -> None:
        self.options = options
        self.src, self.module, self.function, self.name = src, None, object(), src.name
        self.metadata, self.packed_metadata = SimpleNamespace(target=TARGET), (4, 1, 0)
        me = weakref.ref(self)
        self._run = lambda *arguments: me().note(*arguments)  # like Triton's launchers, it keeps no kernel
        # Compiling asks for it, and with it which globals are used.
        assert src.fn.cache_key

    def _init_handles(self) -> None:
        pass

    def address(self, argument: Any) -> Any:
        """A tensor as where it is, also in a tuple."""
        if isinstance(argument, tuple):
            made = map(self.address, argument)
            return type(argument)(*made) if hasattr(argument, "_fields") else tuple(made)
        return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument

    def note(
        self,
        width: int,
        height: int,
        depth: int,
        stream: int,
        function: Any,
        metadata: Any,
        launch_metadata: Any,
        enter: Any,
        leave: Any,
        *arguments: Any,
    ) -> None:
        """Keep what was launched, tensors as addresses; hooks run as in Triton's launchers."""
        if enter is not None:
            enter(launch_metadata)
        addresses = [self.address(x) for x in arguments]
        assert function is self.function and metadata is self.packed_metadata
        here.noted.append((self, (width, height, depth), stream, addresses))
        if leave is not None:
            leave(launch_metadata)


triton.compiler.compile = Compiled
driver.set_active(Driver())
launch.architecture = lambda device: 90
launch.target_programs = lambda device: 6


@triton.jit(do_not_specialize=("rows",))
def small_kernel(x_ptr, y_ptr, mask_ptr, strides, rows, size, factor, FLAG: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr) * SCALE)


def noted(call: Callable[[], Any]) -> list[Any]:
    """What a call launches in this thread."""
    here.noted = []
    call()
    return here.noted


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The kernels that go through Triton's own launch meanwhile."""
    names: list[str] = []
    usual = triton.runtime.JITFunction.run

    def run(self, *arguments, **options):
        names.append(self.__name__)
        return usual(self, *arguments, **options)

    triton.runtime.JITFunction.run = run
    try:
        yield names
    finally:
        triton.runtime.JITFunction.run = usual


def small(**changes: Any) -> tuple[Any, ...]:
    """Arguments of `launcher.launch` for a small kernel."""
    values = {"strides": (64, 1), "rows": 3, "size": 48, "factor": 0.5, "FLAG": True, "num_warps": 4} | changes
    return small_kernel, (2,), launcher.Constants(values), (torch.zeros(64), torch.zeros(64), None)


def agree(arguments: tuple[Any, ...]) -> None:
    """A launch, made twice, is the one that Triton makes."""
    kernel, grid, constants, tensors = arguments
    for _ in range(2):
        ours = noted(lambda: launcher.launch(*arguments))
        theirs = noted(lambda: kernel[grid](**constants.arguments(kernel, tensors)))
        assert len(ours) == len(theirs) == 1
        (ours_compiled, *ours_rest), (theirs_compiled, *theirs_rest) = ours[0], theirs[0]
        assert ours_compiled is theirs_compiled, (kernel.__name__, constants.values)
        assert ours_rest == theirs_rest, (ours_rest, theirs_rest)


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory at an address that is a multiple of 16, or is not, with rows that are, or are not."""
    offset, pad = random.choice((0, 0, 0, 1, 8)), random.choice((0, 0, 3, 16))
    *rows, columns = shape
    storage = torch.zeros(offset + math.prod(rows) * (columns + pad), dtype=dtype)
    return storage[offset:].view(*rows, columns + pad)[..., :columns] if rows else storage[offset : offset + columns]


def draw_heads(packed: bool, rows: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Queries, keys or values in one of the layouts that models hand over."""
    if packed:
        return draw((tokens, heads, head_dim), dtype)
    match random.randrange(4):
        case 0:
            return draw((rows, heads, tokens, head_dim), dtype)
        case 1:
            return draw((1, heads, tokens, head_dim), dtype).expand(rows, -1, -1, -1)
        case 2:
            return draw((rows, heads, head_dim, tokens), dtype).transpose(2, 3)
        case _:
            return draw((rows, tokens, heads, head_dim), dtype).transpose(1, 2)


def draw_call() -> Callable[[], Any]:
    """A forward with its backward, or a step of decoding."""
    dtype = random.choice((torch.float16, torch.bfloat16, torch.float32))
    form = random.choice(("dense", "packed", "decode"))
    rows, kv_heads, group = random.choice((1, 2, 16)), random.choice((1, 2)), random.choice((1, 2))
    tokens, length, head_dim = random.choice((1, 17, 48)), random.choice((0, 1, 16, 20)), random.choice((16, 80))
    entries = random.choice((1, 3))
    packed, heads = form == "packed", kv_heads * group
    q, k, v = (draw_heads(packed, rows, count, tokens, head_dim, dtype) for count in (heads, kv_heads, kv_heads))
    prompts = [draw((entries, kv_heads, length, head_dim), dtype) for _ in range(2)]
    arguments: dict[str, Any] = {"causal": random.random() < 0.5}

    def maybe(name: str, make: Callable[[], Any], chance: float = 0.4) -> None:
        if random.random() < chance:
            arguments[name] = make()

    if packed:
        arguments |= {"cu_seqlens": draw((rows + 1,), torch.int32), "max_seqlen": tokens}
    else:
        maybe("key_mask", lambda: draw((rows, tokens), random.choice((torch.bool, torch.int64, torch.uint8))))
        maybe("bias", lambda: draw((random.choice((1, rows)), random.choice((1, heads)), tokens, tokens), dtype))
    maybe("prompt_index", lambda: draw((rows,), random.choice((torch.int32, torch.int64))), float(entries > 1) or 0.3)
    maybe("prompt_lens", lambda: draw((entries,), torch.int32))
    maybe("prompt_bias", lambda: draw((entries, heads, length), random.choice((dtype, torch.float32))))
    maybe("window", lambda: random.choice((1, 16, 20)))
    maybe("softcap", lambda: random.choice((1.0, 20)))
    maybe("scale", lambda: random.choice((1, 1.0, 0.25)))
    if form == "decode":
        return lambda: prompt_attention_decode(q, k, v, *prompts, **arguments)
    if random.random() < 0.4:
        arguments |= {"dropout_p": 0.1, "seed": draw((1,), torch.int64)}
    grad = draw_heads(packed, rows, heads, tokens, head_dim, dtype)
    needs = Needs(*(random.random() < 0.7 for _ in range(3)), "prompt_bias" in arguments, "bias" in arguments)

    def step() -> None:
        o, lse = prompt_attention_forward(q, k, v, *prompts, **arguments)
        prompt_attention_backward(grad, q, k, v, *prompts, o, lse, needs=needs, **arguments)

    return step


def recorded(calls: list[Callable[[], Any]], forget: bool = False) -> list[tuple[Any, ...]]:
    """The arguments of `launcher.launch` in each call; with nothing known of the calls before it where told so."""
    usual, launches = launcher.launch, []
    launcher.launch = lambda *arguments: launches.append(arguments)
    try:
        for call in calls:
            if forget:
                problem._forms.clear()
            call()
    finally:
        launcher.launch = usual
    return launches
