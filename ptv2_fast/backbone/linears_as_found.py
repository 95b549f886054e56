"""Linear maps of a backbone as they were found: every step asks whether they still are, in passes without Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import attrgetter, contains, eq, is_

from torch import Tensor, nn

_Place = tuple[nn.Module, str, nn.Module]

_children, _parameters = attrgetter("_modules"), attrgetter("_parameters")
_HOOKS = tuple(map(attrgetter, ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")))
_dtype, _requires_grad = attrgetter("dtype"), attrgetter("requires_grad")


class LinearsAsFound:
    """Frozen maps of a weight and perhaps a bias, that nobody hooks, where they were and with the tensors they had."""

    def __init__(self, places: Iterable[_Place], linears: Sequence[nn.Module]):
        """Note how they are.

        Args:
            places: (module, name of a child, that child) on the way to each of them.
            linears: nn.Linear, or transformers' Conv1D.
        """
        self._linears = list(linears)
        self._kinds = list(map(type, self._linears))
        unique = {(id(parent), name): (parent, name, child) for parent, name, child in places}
        self._parents, self._names, self._parts = (
            map(list, zip(*unique.values(), strict=True)) if unique else ([], [], [])
        )
        self._own = [linear.__dict__ for linear in self._linears]
        self._tensors = self._all_tensors()
        self._present = [tensor for tensor in self._tensors if tensor is not None]
        self._addresses = list(map(Tensor.data_ptr, self._present))
        self._dtypes = list(map(_dtype, self._present))

    def is_so(self) -> bool:
        """Whether the linear maps are the same and plain, and their tensors the same, frozen and where they were."""
        return (
            all(map(is_, map(dict.get, map(_children, self._parents), self._names), self._parts))
            and all(map(is_, map(type, self._linears), self._kinds))
            and not any(any(map(hooks, self._linears)) for hooks in _HOOKS)
            and not any(map(contains, self._own, repeat("forward")))
            and all(map(is_, self._all_tensors(), self._tensors))
            and not any(map(_requires_grad, self._present))
            and all(map(eq, map(Tensor.data_ptr, self._present), self._addresses))
            and all(map(is_, map(_dtype, self._present), self._dtypes))
        )

    def _all_tensors(self) -> list[Tensor | None]:
        parameters = list(map(_parameters, self._linears))
        return [*map(dict.get, parameters, repeat("weight")), *map(dict.get, parameters, repeat("bias"))]


def way_down(module: nn.Module, path: Sequence[str]) -> list[_Place]:
    """(module, name of a child, that child) of each step from a module down a path."""
    way = []
    for name in path:
        child = module.get_submodule(name)
        way.append((module, name, child))
        module = child
    return way
