"""Memory of a computation on the CPU: bytes of the tensors that operations made and that are still alive."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts memory that operations allocate while this mode is on.

    What lives inside one operation (a kernel's workspace) is not seen; memory from before does not count.

    Attributes:
        peak: most bytes alive at the end of an operation.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] = set()

    @property
    def live(self) -> int:
        """Bytes alive at this moment."""
        gone = [key for key, (storage, _) in self._live.items() if storage.expired()]
        for key in gone:
            del self._live[key]
        return sum(size for _, size in self._live.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        output = function(*args, **kwargs)
        live = self.live
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
                continue
            key = _key(tensor)
            # A view of, or a result in, memory that was there before.
            if key in inputs or key in self._live:
                continue
            storage = tensor.untyped_storage()
            self._live[key] = (StorageWeakRef(storage), storage.nbytes())
            live += storage.nbytes()
        self.peak = max(self.peak, live)
        return output


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def measure_memory(forward, backward, device: torch.device) -> dict[str, int]:
    """Bytes of a step beyond what was there before it: those kept for backward, and the most at any time.

    Args:
        forward: () -> loss.
        backward: (loss) -> None, the rest of the step.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = forward()
        kept = torch.cuda.memory_allocated() - before
        backward(loss)
        torch.cuda.synchronize()
        return {"kept_bytes": kept, "peak_bytes": torch.cuda.max_memory_allocated() - before}
    with LiveBytes() as memory:
        loss = forward()
        kept = memory.live
        backward(loss)
    return {"kept_bytes": kept, "peak_bytes": memory.peak}
