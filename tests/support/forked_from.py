"""What the server of forked processes imports before it forks any: nobody imports it again, and nothing is computed."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
from contextlib import suppress

gc.disable()  # collecting garbage looks at all that may be some, which what is imported never is
import torch  # noqa: E402

import quick_interpreter  # noqa: E402

for _name in (
    "benchmarks.card.child",
    "transformers.trainer",
    "torch.distributed.fsdp",
    # What torch.compile and the interpreter import when they are first called.
    "torch._inductor.compile_fx",
    "triton.experimental.gluon",
):
    with suppress(ImportError):
        importlib.import_module(_name)
if os.environ.get("TRITON_INTERPRET") == "1":
    with suppress(ImportError):
        quick_interpreter.install()
# As in the tests' own process: threads of several phases would wait for each other.
torch.set_num_threads(1)
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)  # or modules in C++ report as leaks what lives until the end
