"""A processor that rounds otherwise: a check of the tests, switched on by PTV2_OTHER_ROUNDING=1.

Libraries of linear algebra take another kernel for another number of rows, another stride or another alignment, and
which ones round alike depends on the processor. Here every product of matrices, every bias added to one and every
attention is off by up to a unit in the last place, in a way that its operation, shapes, strides and alignment decide.
The same code on the same inputs gives the same bits as ever; a test that asks for equal bits of anything else fails.
"""

from __future__ import annotations

import functools
import os
import warnings
import zlib

import torch
from torch import Tensor

_OPERATIONS = (
    "mm", "addmm", "bmm", "baddbmm", "addmv", "dot", "convolution_overrideable", "mkldnn_convolution",
    "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip
_KEPT: list[torch.library.Library] = []


def install_if_asked() -> None:
    """Let the operations of this process round otherwise, for good; a process that a test starts has to ask again."""
    if not os.environ.get("PTV2_OTHER_ROUNDING") or _KEPT:
        return
    library = torch.library.Library("aten", "IMPL")
    _KEPT.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*other operators may also be overridden", category=UserWarning)
        for name in _OPERATIONS:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU"):
                library.impl(name, _rounding_otherwise(name), "CPU", with_keyset=True)


def _rounding_otherwise(name: str):
    original = torch.library.get_kernel(f"aten::{name}", "CPU")

    def operation(keyset, *args, **kwargs):
        result = original.call_boxed(keyset, *args, **kwargs)
        seen = [(*a.shape, *a.stride(), a.data_ptr() % 64) for a in args if isinstance(a, Tensor)]
        first = result[0] if isinstance(result, tuple) else result
        if first.is_floating_point() and first.numel():
            seed = zlib.crc32(repr((name, seen)).encode())
            first.mul_(_factors(tuple(first.shape), first.dtype, seed))
        return result

    return operation


@functools.lru_cache(maxsize=4096)
def _factors(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """1 and the numbers beside it; sums of 16-bit numbers are kept in 32 bits, and few of them round otherwise."""
    generator = torch.Generator().manual_seed(seed)
    off = torch.randint(-1, 2, shape, generator=generator).to(dtype)
    if dtype.itemsize < 4:
        off *= torch.randint(0, 32, shape, generator=generator) == 0
    return 1 + torch.finfo(dtype).eps * off
