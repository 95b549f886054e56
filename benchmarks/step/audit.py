"""Whether a whole training step ever holds a tensor over prompt and text, or a copy of the prompt for each row.

Two witnesses: every operation's outputs, on the CPU, and the blocks that the CUDA allocator gave out, which also show
what custom operations allocate inside.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.attention.audit import joint_sizes, rounded, traced_sizes
from benchmarks.attention.cases import Case
from benchmarks.step.cases import StepCase
from benchmarks.step.models import sizes_of

# Blocks smaller than this are no copy of hidden states, and too many sizes of weights are like them.
_SMALLEST_BLOCK = 2**18


class JoinedShapes(TorchDispatchMode):
    """Collects the operations that made what no step should make.

    Attributes:
        hits: (operation, shape) of outputs with P + N or B * (P + N) in their shape, and of copies of a prompt's P
            rows for each of the B rows.
        operations: how many ran.
    """

    def __init__(self, case: StepCase, allowed: Callable[[tuple[int, ...]], bool] = lambda shape: False):
        super().__init__()
        total = case.P + case.N
        self._joined = {total, case.B * total}
        self._rows, self._length, self._allowed = case.B, case.P, allowed
        self.hits: list[tuple[str, tuple[int, ...]]] = []
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and self._is_hit(tensor):
                self.hits.append((str(function), tuple(tensor.shape)))
        return output

    def _is_hit(self, tensor: Tensor) -> bool:
        shape = tuple(tensor.shape)
        if self._allowed(shape):
            return False
        if self._joined & set(shape):
            return True
        # Five axes are partial sums of a prompt's gradient, (slots, prompts, heads, P, d): as many as keep a card busy,
        # here by chance one for each row.
        copied = shape[:1] == (self._rows,) and self._length in shape[1:] and len(shape) != 5
        # A view that repeats one prompt for every row takes no memory.
        return copied and tensor.stride(0) != 0


def inside_attention(case: StepCase, base: nn.Module) -> Callable[[tuple[int, ...]], bool]:
    """What our torch backend joins, inside attention and nowhere else: keys, values, and their mask."""
    sizes = sizes_of(base)
    heads = {1, sizes.num_heads, sizes.num_kv_heads}
    total = case.P + case.N

    def allowed(shape: tuple[int, ...]) -> bool:
        if len(shape) != 4 or shape[1] not in heads:
            return False
        keys = shape[2] in (total, case.P) and shape[3] == sizes.head_dim
        return keys or (shape[2] in (1, case.N) and shape[3] in (total, case.P))

    return allowed


def forbidden_blocks(case: StepCase, base: nn.Module) -> set[int]:
    """Bytes of every block that a tensor over P + N, or the prompt copied for each row, would take."""
    sizes = sizes_of(base)
    attention = Case(case.model, case.B, case.N, case.P, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
    widths = {
        sizes.hidden_size, sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim,
        base.config.intermediate_size, 2 * base.config.intermediate_size, 3 * sizes.hidden_size,
    }  # fmt: skip
    joined = {case.B * (case.P + case.N) * width for width in widths}
    copied = {case.B * case.P * width for width in (sizes.hidden_size, sizes.num_kv_heads * sizes.head_dim)}
    found = joint_sizes(attention) | rounded([count * size for count in joined | copied for size in (1, 2, 4)])
    return {size for size in found if size >= _SMALLEST_BLOCK}


def forbidden_among(case: StepCase, base: nn.Module, step: Callable[[], object]) -> tuple[list[int], int]:
    """Sizes of forbidden blocks that a step took from the CUDA allocator, and how many blocks it took in all."""
    sizes = traced_sizes(step)
    return sorted(rounded(sizes) & forbidden_blocks(case, base)), len(sizes)
