"""Linear maps that read the same input, as one matrix product: queries, keys and values; gate and up.

The weights of such a group are moved into one buffer, and each parameter becomes a view of its part: there is no second
copy, and state_dict, save_pretrained, optimizers and whoever reads `module.weight` see what they saw before. What looks
at memory itself sees the buffer: `safetensors.torch.save_model` wants `release` first, which is part of `unload`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptv2_fast.backbone.linears_as_found import LinearsAsFound, way_down
from ptv2_fast.step.column_split import ColumnSplit

# Children, by their names in transformers, that are given the same input.
_GROUPS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    # DeBERTa's, the first being the one that nothing but the text goes through.
    ("value_proj", "key_proj", "query_proj"),
    ("gate_proj", "up_proj"),
)


class FusedProjections:
    """Groups of frozen linear maps of a backbone, each computed by one matrix product."""

    def __init__(self, backbone: nn.Module):
        """Find the groups; nothing is moved before `modules` is called."""
        self._backbone = backbone
        self._groups = _groups_of(backbone)
        self._found: dict[str, nn.Module] = {}
        # How the groups were found when they were last gathered, all of them whole.
        self._left: LinearsAsFound | None = None

    def __len__(self) -> int:
        return len(self._groups)

    def modules(self) -> Mapping[str, nn.Module]:
        """What stands in a view of the backbone at each path; the weights are moved where they are not in place yet.

        The same object for as long as the same groups are whole.
        """
        left = self._left
        if left is not None and left.is_so():
            return self._found
        if not all(group.is_part_of(self._backbone) for group in self._groups):
            self._groups, self._found = _groups_of(self._backbone), {}
        whole = [group for group in self._groups if group.is_whole()]
        for group in whole:
            group.gather()
        self._left = _as_found(self._backbone, whole) if len(whole) == len(self._groups) else None
        found: dict[str, nn.Module] = {path: module for group in whole for path, module in group.modules.items()}
        if found.keys() != self._found.keys():
            self._found = found
        return self._found

    def whole(self) -> list[FusedGroup]:
        """The groups that `modules` has gathered."""
        return [group for group in self._groups if not self._found.keys().isdisjoint(group.modules)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_left": None}

    def release(self) -> None:
        """Give every parameter memory of its own again."""
        self._left = None
        for group in self._groups:
            group.release()


def _as_found(backbone: nn.Module, groups: Sequence[FusedGroup]) -> LinearsAsFound:
    places = [place for group in groups for place in group.places(backbone)]
    return LinearsAsFound(places, [linear for group in groups for linear in group.linears])


class FusedGroup:
    """Linear maps of one input, side by side in one buffer.

    Attributes:
        modules: path -> the module that stands in for the linear map there.
        parent, names, linears: the module that has the linear maps, their names in it, and they.
        weight: all their weights, one below the other; None before `gather`.
        product: computes all maps of an input, called as F.linear is.
    """

    def __init__(self, path: str, parent: nn.Module, names: Sequence[str]):
        self.path = path.split(".") if path else []
        self.parent = parent
        self.names = names
        self.linears = [parent.get_submodule(name) for name in names]
        self._split = ColumnSplit([linear.out_features for linear in self.linears])
        self.weight: Tensor | None = None
        self.product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
        self._bias: Tensor | None = None
        # (input, what the linear maps after the first one make of it), between their calls in one forward.
        self._kept: tuple[Tensor, list[Tensor]] | None = None
        paths = [f"{path}.{name}" if path else name for name in names]
        self.modules = {path: _FusedLinear(self, position) for position, path in enumerate(paths)}

    def is_part_of(self, backbone: nn.Module) -> bool:
        """Whether the group's parent is still where it was found."""
        module: nn.Module | None = backbone
        for name in self.path:
            module = None if module is None else module._modules.get(name)
        return module is self.parent

    def places(self, backbone: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
        """(module, name of a child, that child) on the way from the backbone to each linear map."""
        own = zip(self.names, self.linears, strict=True)
        return [*way_down(backbone, self.path), *((self.parent, name, linear) for name, linear in own)]

    def is_whole(self) -> bool:
        """Whether the linear maps are still the parent's, and can be fused."""
        own = all(
            self.parent._modules.get(name) is linear for name, linear in zip(self.names, self.linears, strict=True)
        )
        return own and _can_fuse(self.linears)

    def gather(self) -> None:
        """Move the weights (and biases) into one buffer, unless they lie there already."""
        weights = [linear.weight for linear in self.linears]
        if self.weight is None or not _lie_in(self.weight, weights):
            self.weight = _side_by_side(weights)
        biases = [linear.bias for linear in self.linears]
        if biases[0] is not None and (self._bias is None or not _lie_in(self._bias, biases)):
            self._bias = _side_by_side(biases)

    def release(self) -> None:
        """Give every parameter memory of its own again."""
        for linear in self.linears:
            for parameter in linear.parameters():
                parameter.data = parameter.data.clone()
        self.weight = self._bias = None

    def first(self, x: Tensor) -> Tensor:
        """The first linear map of x (..., D); the others' results wait for `next`."""
        weight: Any = self.weight  # `gather` comes before every forward
        result, *rest = self._split(self.product(x, weight, self._bias))
        self._kept = (x, rest)
        return result

    def next(self, x: Tensor, position: int) -> Tensor:
        """The linear map at `position` of x: computed with the first one where that had the very same input."""
        kept = self._kept
        # Another thread, or a layer that gives each map an input of its own, finds something else here.
        if kept is None or kept[0] is not x:
            return self.linears[position](x)
        if position == len(self.linears) - 1:
            self._kept = None
        return kept[1][position - 1]


class _FusedLinear(nn.Module):
    """Stands in for one linear map of a group."""

    def __init__(self, group: FusedGroup, position: int):
        super().__init__()
        self._group = group
        self._position = position

    def forward(self, x: Tensor) -> Tensor:
        return self._group.first(x) if self._position == 0 else self._group.next(x, self._position)

    @property
    def weight(self) -> Tensor:
        """The linear map's own parameter, for code that asks for its dtype."""
        return self._group.linears[self._position].weight


def _groups_of(backbone: nn.Module) -> list[FusedGroup]:
    return [
        FusedGroup(path, module, names)
        for path, module in backbone.named_modules()
        for names in _GROUPS
        if all(n in module._modules for n in names) and _can_fuse([module.get_submodule(n) for n in names])
    ]


def _can_fuse(modules: Sequence[nn.Module]) -> bool:
    """Whether the modules are plain frozen linear maps of one input size, which nobody hooks, shards or replaces."""
    if any(type(m) is not nn.Linear or "forward" in m.__dict__ for m in modules):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules):
        return False
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    if any(type(p) is not nn.Parameter or p.requires_grad for p in parameters):
        return False
    sizes = {(m.in_features, m._parameters["bias"] is None) for m in modules}
    kinds = {(p.dtype, p.device) for p in parameters}
    return len(sizes) == len(kinds) == 1 and len(set(map(id, parameters))) == len(parameters)


def _lie_in(buffer: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether the parts are the buffer's rows, one after the other."""
    address = buffer.data_ptr()
    for part in parts:
        if part.data_ptr() != address or part.dtype != buffer.dtype or part.device != buffer.device:
            return False
        address += part.numel() * part.element_size()
    return True


@torch.no_grad()
def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """A buffer with the rows of all parts, of which each part becomes a view."""
    first = parts[0]
    rows = sum(part.shape[0] for part in parts)
    if all(part.is_contiguous() for part in parts):
        # Another wrapper of the same base may have moved them.
        size = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
        if size >= rows * first[0].numel():
            whole = first.detach().as_strided((rows, *first.shape[1:]), first.stride())
            if _lie_in(whole, parts):
                return whole
    buffer = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, buffer.split([part.shape[0] for part in parts]), strict=True):
        part.data = view
    return buffer
