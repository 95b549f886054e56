"""A Triton driver that launches nothing: what the host does for a launch can be measured without a device.

Every launch goes its real way through our host functions and through Triton's binder, on CPU tensors; the driver, the
compiler and the compiled kernel at its end are stand-ins. What kernels would write stays as it was allocated.
"""

from __future__ import annotations

import os
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import torch

# As many programs as an H100 asks for.
_PROGRAMS = 4 * 132


def install() -> Any:
    """From now on this process launches for a Hopper that is not there; gives an object that counts `launches`.

    Not undone: for a process of its own.

    Raises:
        RuntimeError: Triton is interpreted, and an interpreted kernel has no launch.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET must not be 1: an interpreted kernel has no launch")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    from ptv2_fast.attention import checks, triton_backend
    from ptv2_fast.kernels import launch
    from ptv2_fast.prompts import projection

    target = GPUTarget("cuda", 90, 32)
    counts = SimpleNamespace(launches=0)

    class Driver:
        """One device and one stream."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return target

    class Compiled(CompiledKernel):
        """What Triton keeps for one key."""

        def __init__(self, src: Any, **_: Any) -> None:
            self.src, self.module, self.function, self.name = src, None, object(), src.name
            self.metadata, self.packed_metadata = SimpleNamespace(target=target), (4, 1, 0)
            me = weakref.ref(self)
            self._run = lambda *arguments: me().count()
            assert src.fn.cache_key  # finds the globals that a kernel uses, as compiling does

        def _init_handles(self) -> None:
            pass

        def count(self) -> None:
            """Where the device would be called."""
            counts.launches += 1

    def serves(device: object) -> None:
        return None

    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's, about names of transformers
    triton.compiler.compile = Compiled
    driver.set_active(Driver())
    launch.architecture = lambda device: 90
    launch.target_programs = lambda device: _PROGRAMS
    triton_backend.unavailable_reason = projection.unavailable_reason = serves
    # On a device no value is looked at.
    checks.readable = lambda tensor: False
    # What is allocated and never written may hold numbers that a CPU is slow with.
    torch.set_flush_denormal(True)
    return counts
