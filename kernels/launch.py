"""How a kernel is launched: tile sizes per architecture, fresh outputs, and what 32-bit tile offsets can hold."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ptv2_fast.kernels import interpreter, launcher

interpreter.repair()

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PASSES = (
    "forward", "backward_query", "backward_text", "backward_prompt", "backward_rows_64", "backward_rows_128", "decode",
)  # fmt: skip

# AMD's MI300, which has no compute capability.
GFX942 = 942

# Arithmetic inside a tile is done in 32 bits: the largest tile has 128 rows and 256 columns.
_LARGEST_TILE_STRIDE = 2**31 // (128 + 256) - 1


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and compiler options of one kernel: BLOCK_M queries by BLOCK_N keys.

    `maxnreg` bounds the registers of a thread (CUDA alone), so that more blocks share a multiprocessor; None leaves
    them to the compiler. `short_maxnreg` is the bound where a prompt's gradients are summed in a tile of less than
    BLOCK_N keys because the prompt is that short; None: the same.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    short_maxnreg: int | None = None

    @property
    def shortened(self) -> LaunchConfig:
        """For a prompt's gradients in a tile of less than BLOCK_N keys."""
        return replace(self, maxnreg=self.short_maxnreg or self.maxnreg)

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


# One row per pass: padded head size -> `LaunchConfig`'s fields in order, for 16-bit tensors. Every entry is compiled
# ahead of time and must not spill in a loop (kernels/README.md holds the table). Starting points, not measurements.
_Table = Mapping[str, Mapping[int, tuple[Any, ...]]]
_HALF = {
    "forward": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
    "backward_query": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    "backward_text": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
    "backward_prompt": {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
    "decode": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (16, 16, 8, 2)},
}
# Hopper's own, the fastest of a sweep on an H200 (benchmarks/results): whole tensor tiles for each group of four warps
# (the tile that is summed has 16 rows and more for each warp; with fewer, two groups compute the same product) and two
# blocks a multiprocessor and more. Not in the sweep were the bound of 168 registers, without which a mask would leave
# two blocks of three, and that of decoding, which waits for memory: it makes room for a second block, and spills
# nothing. Nor was the bound for short prompts, the last number: it makes room for a third block, beside which the loop
# may step to its tiles, and spills nothing at d = 64 and 128. Crowded kernels keep the table above.
_HOPPER_HALF: _Table = {
    "forward": {64: (128, 64, 8, 3, 128), 128: (128, 32, 8, 3, 128)},
    "backward_query": {64: (64, 64, 4, 3, 168), 128: (64, 32, 4, 3)},
    "backward_text": {64: (32, 64, 4, 2, 168), 128: (32, 64, 4, 3)},
    "backward_prompt": {64: (64, 64, 4, 3, None, 168), 128: (32, 64, 4, 3, None, 168)},
    "decode": {128: (64, 64, 8, 2, 128)},
}
# Ampere's own: sums of 64 rows have work for four warps of 16; eight compute some products twice (the table of hot
# loops says so), and two blocks of four are as many warps.
_AMPERE_HALF: _Table = {
    "backward_query": {128: (64, 32, 4, 2)},
    "backward_text": {128: (32, 64, 4, 2)},
    "backward_prompt": {64: (32, 64, 4, 2), 128: (32, 64, 4, 2)},
}
# Blackwell's own, the prompt's for the same reason: 32 virtual tokens and fewer are too small a tile for its products
# of blocks. Without a bound dQ takes some registers more than two blocks of a multiprocessor have, and the prompt's two
# more than four; with it nothing is spilled in a loop. Short prompts are bounded as on Hopper.
_BLACKWELL_HALF: _Table = {
    "backward_query": {64: (128, 64, 8, 2, 128)},
    "backward_prompt": {64: (32, 64, 4, 2, 128), 128: (32, 64, 4, 2, None, 168)},
}
# float32 is computed exactly (no TF32), on the ordinary cores: operands sit in registers, so tiles are small.
_SINGLE = {
    "forward": {64: (32, 16, 8, 2), 128: (16, 16, 8, 2), 256: (16, 16, 8, 2)},
    "backward_query": {64: (32, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "backward_text": {64: (32, 32, 8, 2), 128: (32, 32, 16, 1), 256: (16, 16, 16, 1)},
    "backward_prompt": {64: (32, 32, 8, 2), 128: (32, 32, 16, 1), 256: (16, 16, 8, 1)},
    "decode": {64: (16, 32, 8, 2), 128: (16, 16, 8, 2), 256: (16, 16, 16, 1)},
}
# Exceptions, where the tables above, or half a tile where a kernel is crowded (see `choose_config`), would spill.
_SINGLE_CROWDED = {
    "forward": {64: (32, 16, 4, 2), 128: (16, 16, 16, 1), 256: (16, 16, 16, 1)},
    "backward_query": {64: (32, 16, 16, 1), 128: (16, 16, 16, 1)},
    "backward_text": {64: (16, 32, 16, 1), 128: (16, 32, 16, 1), 256: (16, 16, 8, 1)},
}
_BLACKWELL_SINGLE = {"backward_query": {256: (16, 16, 16, 1)}}
_HALF_CROWDED: _Table = {"backward_text": {128: (16, 32, 8, 1)}}
_BLACKWELL_HALF_CROWDED: _Table = {
    "backward_query": {128: (32, 32, 8, 2)}, "backward_text": {64: (16, 128, 8, 1), 128: (16, 32, 8, 1)},
}  # fmt: skip
_GFX942: _Table = {"backward_query": {128: (64, 32, 8, 1)}, "backward_prompt": {128: (16, 64, 8, 1)}}
_HALF_OF_ITS_OWN: dict[int, _Table] = {80: _AMPERE_HALF, 90: _HOPPER_HALF, GFX942: _GFX942}
# Short rows: as many queries as the pass's name says, and their keys in tiles; one table for every card in 16 bits.
# `row_backward.refusal` refuses float32 and d = 256 on a card: the last row stands for both.
_ROWS: _Table = {
    "backward_rows_64": {64: (64, 64, 4, 1), 128: (64, 16, 4, 1), 256: (32, 16, 8, 1)},
    "backward_rows_128": {64: (128, 64, 8, 1), 128: (128, 32, 8, 1), 256: (32, 16, 8, 1)},
}
# Triton's interpreter has no registers to fill; small tiles let small tests cross many tile borders.
_INTERPRETER = LaunchConfig(block_m=32, block_n=32, num_warps=4, num_stages=1)


def padded_head_dim(head_dim: int) -> int:
    """The power of two a tile of this head size occupies (80, 96 -> 128; 192 -> 256)."""
    return 1 << (head_dim - 1).bit_length()


def config_row(head_dim: int) -> int:
    """The row of the tables above that a head size uses."""
    return max(64, padded_head_dim(head_dim))


def choose_config(
    arch: int, head_dim: int, dtype: torch.dtype, kernel_pass: str, crowded: bool = False
) -> LaunchConfig:
    """The launch configuration of a pass.

    Args:
        arch: compute capability times ten (80, 90, 100, ...), `GFX942`, or 0 for Triton's interpreter.
        head_dim: one of `HEAD_DIMS`.
        dtype: one of `DTYPES`.
        kernel_pass: one of `PASSES`.
        crowded: whether a tile's scores share the registers with something else: dropout's generator, a bias, the
            slope of a softcap.
    Raises:
        ValueError: an argument is not one of those.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS}; got {head_dim}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}; got {dtype}")
    if kernel_pass not in PASSES:
        raise ValueError(f"kernel_pass must be one of {PASSES}; got {kernel_pass!r}")
    if arch == 0:
        return _INTERPRETER
    if kernel_pass in _ROWS:
        return LaunchConfig(*_ROWS[kernel_pass][256 if dtype == torch.float32 else config_row(head_dim)])
    table = (_SINGLE if dtype == torch.float32 else _HALF)[kernel_pass]
    block_m, block_n, num_warps, num_stages = table[config_row(head_dim)]
    if shared_memory_limit(arch) < 128 * 1024:
        num_stages = min(num_stages, 2)
        block_m, block_n = min(block_m, 64), min(block_n, 64)
    if arch == GFX942 and kernel_pass.startswith("backward"):
        # Operands held ahead of time would take the registers that the gradients need.
        num_stages = 1
    exception = _exceptions(arch, dtype, crowded).get(kernel_pass, {}).get(config_row(head_dim))
    if exception is not None:
        return LaunchConfig(*exception)
    if not crowded:
        return LaunchConfig(block_m, block_n, num_warps, num_stages)
    if config_row(head_dim) > 64:
        num_stages = min(num_stages, 2)
    if kernel_pass in ("forward", "backward_query"):
        block_n = max(16, block_n // 2)
    elif block_m > 16:
        block_m //= 2
    elif kernel_pass == "backward_text":
        block_n = max(16, block_n // 2)
    return LaunchConfig(block_m, block_n, num_warps, num_stages)


def _exceptions(arch: int, dtype: torch.dtype, crowded: bool) -> _Table:
    blackwell = 100 <= arch < 120
    if dtype == torch.float32:
        return _SINGLE_CROWDED if crowded else _BLACKWELL_SINGLE if blackwell else {}
    if crowded:
        return _BLACKWELL_HALF_CROWDED if blackwell else _HALF_CROWDED
    return _BLACKWELL_HALF if blackwell else _HALF_OF_ITS_OWN.get(arch, {})


@dataclass(frozen=True)
class ProjectionConfig:
    """Tile sizes of the layered matrix product: BLOCK_M prompt rows by BLOCK_N features, BLOCK_K at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_projection_config(arch: int, dtype: torch.dtype, rows: int) -> ProjectionConfig:
    """The configuration for products of `rows` prompt rows; weights are read once per tile of rows."""
    if arch == 0:
        return ProjectionConfig(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=1)
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if dtype == torch.float32:
        return ProjectionConfig(min(block_m, 32), block_n=32, block_k=32, num_warps=4, num_stages=2)
    return ProjectionConfig(block_m, block_n=64, block_k=64, num_warps=4, num_stages=3)


def shared_memory_limit(arch: int) -> int:
    """Bytes of shared memory one program may use.

    Source: CUDA C++ Programming Guide, technical specifications; AMD Instinct MI300 instruction set, local data share.
    """
    if arch == GFX942:
        return 64 * 1024
    if arch in (86, 89) or arch >= 120:
        return 99 * 1024
    if arch in (80, 87):
        return 163 * 1024
    return 227 * 1024


@functools.cache
def _cuda_architecture(index: int) -> int:
    if torch.version.hip is not None:
        return GFX942
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel and every argument it would have been called with."""

    kernel: Any
    arguments: dict[str, Any]


@dataclass
class _Recorder:
    arch: int
    launches: list[Launch]


_recorder: _Recorder | None = None


@contextlib.contextmanager
def record(arch: int) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, with configurations chosen for `arch`; works without a GPU.

    This is how `aot.py` compiles exactly what the host functions launch. Not for concurrent use.
    """
    global _recorder
    before, _recorder = _recorder, _Recorder(arch, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = before


def is_recording() -> bool:
    """Whether launches are collected."""
    return _recorder is not None


def run(
    kernel: Any, grid: tuple[int, ...], device: torch.device, tensors: launcher.Tensors, constants: launcher.Constants
) -> None:
    """Launch a kernel on `device`; an empty grid launches nothing.

    Args:
        tensors: its first arguments.
        constants: the others, an object that is kept from call to call: that makes a launch cheap.
    """
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, constants.arguments(kernel, tensors)))
        return
    if 0 in grid:
        return
    # Triton launches on the current device, which need not be the tensors' one.
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            launcher.launch(kernel, grid, constants, tensors)
    else:
        launcher.launch(kernel, grid, constants, tensors)


def architecture(device: torch.device) -> int:
    """Compute capability times ten, `GFX942` under ROCm, or 0 on the CPU (Triton's interpreter)."""
    if _recorder is not None:
        return _recorder.arch
    if device.type != "cuda":
        return 0
    return _cuda_architecture(torch.cuda.current_device() if device.index is None else device.index)


def target_programs(device: torch.device) -> int:
    """How many programs keep the device busy; decides how finely a reduction is split."""
    if device.type != "cuda":
        return 6
    return 4 * _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for an output; every element is written by the kernel that gets it."""
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    if launcher.here.notes is not None:
        launcher.here.notes.allocated.append(made)
    return made


def allocate_strided(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The same, laid out by strides that give every element a place of its own."""
    made = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    if launcher.here.notes is not None:
        launcher.here.notes.allocated.append(made)
    return made


def allocate_statistics(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Fresh float32 numbers of each query, (..., N), in rows that begin at multiples of 16.

    Triton compiles a kernel once for strides that are such multiples and once for others: N changes from batch to
    batch, and the second kind would stop a training run for seconds.
    """
    *rows, tokens = shape
    width = -(-tokens // 16) * 16
    made = allocate((*rows, width), torch.float32, device)
    return made if width == tokens else made[..., :tokens]


def allocate_pair_like(tensor: torch.Tensor, slack: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of fresh memory with the shape, strides and dtype of one whose elements lie in places of their own.

    Args:
        slack: elements that may be read, not written, behind the last one of each.
    """
    reach = (
        1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel()
        else 0
    )
    plane = -(-(reach + slack) // 16) * 16
    flat = allocate((2 * plane,), tensor.dtype, tensor.device)
    first, second = flat.as_strided((2, *tensor.shape), (plane, *tensor.stride())).unbind(0)
    return first, second


def allocate_heads(like: torch.Tensor) -> torch.Tensor:
    """A fresh (B, H, N, d) tensor laid out as (B, N, H, d), so that merging the heads is free; or (T, H, d) packed."""
    if like.dim() == 3:
        return allocate(like.shape, like.dtype, like.device)
    batch, heads, tokens, head_dim = like.shape
    width = heads * head_dim
    return allocate_strided(like.shape, (max(1, tokens) * width, head_dim, width, 1), like.dtype, like.device)


def prompt_strides(like: torch.Tensor) -> tuple[int, ...]:
    """Strides of gradients of prompts (R, Hkv, P, d).

    A prompt that is a view of (R, P, Hkv, d), as projected ones are, gets its gradient laid out so: what made it a view
    is undone without a copy. Others are contiguous.
    """
    _, heads, length, head_dim = like.shape
    of_entry = max(1, heads) * max(1, length) * head_dim
    if like.transpose(1, 2).is_contiguous():
        return of_entry, head_dim, max(1, heads) * head_dim, 1
    return of_entry, max(1, length) * head_dim, head_dim, 1


def tile_safe(tensor: torch.Tensor, rows: int = -2) -> torch.Tensor:
    """`tensor`, copied only when the strides of axis `rows` or the last are too long for 32-bit offsets in a tile."""
    strides = tensor.stride()
    if max(strides[rows], strides[-1]) > _LARGEST_TILE_STRIDE and tensor.numel():
        return tensor.contiguous()
    return tensor


def split(target: int, programs: int, most: int) -> int:
    """Into how many parts to split each of `programs` programs, at most `most`, so that there are `target`."""
    return max(1, min(most, -(-target // max(1, programs))))
