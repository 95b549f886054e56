"""The frozen linear maps of a backbone's layers in float8: which can be, and what stands in for them in a view.

A weight is quantized once and kept beside the base's own, which stays as it is; the copy is made again, in its own
memory, where the weight has been written to since. Weights that torchao keeps in float8 are read where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ptv2_fast.backbone.float8_bases import has_float8_blocks, kept_float8, lacks_backward
from ptv2_fast.backbone.float8_linear import MULTIPLE, Float8Rows, float8_linear, quantize_rows
from ptv2_fast.backbone.linears_as_found import LinearsAsFound, way_down
from ptv2_fast.step.float8_plan import Float8Found
from ptv2_fast.step.fused_projections import FusedProjections

# Which experts a token goes to is decided by a comparison: nearly equal ones would change places.
_ROUTERS = ("gate", "router")
# One object: whether groups are the same ones is asked by identity.
_NO_GROUPS: Mapping[str, nn.Module] = {}


def find_float8(backbone: PreTrainedModel, layers_path: str, device: torch.device) -> Float8Found:
    """Look at every linear map of the layers."""
    refused = why_not_device(device)
    maps = _maps_of(backbone, layers_path)
    whys = {path: refused or why_not(path, module) for path, module in maps.items()}
    lacking = [whys[path] for path, module in maps.items() if lacks_backward(module)]
    return Float8Found(
        len(maps),
        served=sum(why is None for why in whys.values()),
        stay=Counter(why for why in whys.values() if why is not None),
        without_backward=len(lacking),
        stranded=sum(why is not None for why in lacking),
        imitated=device.type == "cpu",
    )


def _maps_of(backbone: PreTrainedModel, layers_path: str) -> dict[str, nn.Module]:
    """Path -> linear map, of all modules in the layers that are one by their kind."""
    return {
        path: module
        for path, module in backbone.named_modules()
        if path.startswith(f"{layers_path}.") and isinstance(module, (nn.Linear, Conv1D))
    }


def why_not_device(device: torch.device) -> str | None:
    """Why a device has no products of float8 numbers with scales by rows; None where it has, or they are imitated."""
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "ROCm's float8 are other numbers"
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 9) else f"the card's compute capability is {capability}, less than (8, 9)"
    return None if device.type == "cpu" else f"the device type is {device.type!r}, neither 'cuda' nor 'cpu'"


def why_not(path: str, module: nn.Module) -> str | None:
    """Why a linear map of a layer stays as it is; None where it can be computed in float8."""
    if has_float8_blocks(module):
        return "float8 in blocks (FineGrainedFP8Config), with a forward and backward of transformers' own"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, and no nn.Linear"
    if path.rpartition(".")[2] in _ROUTERS:
        return "a router of experts"
    if own := _own_code(module):
        return own
    parameters = [p for p in module._parameters.values() if p is not None]
    if any(p.requires_grad for p in parameters):
        return "it trains"
    kept = kept_float8(module)
    if kept is None and any(type(p) is not nn.Parameter for p in parameters):
        return f"its weight is a {type(module.weight).__name__} with no float8 scale a row"
    if kept is None and not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    rows, columns = module.weight.shape
    if rows % MULTIPLE or columns % MULTIPLE:
        return f"its sizes are no multiples of {MULTIPLE}"
    return None


def _own_code(module: nn.Module) -> str | None:
    """What somebody has made a module run besides its own forward; None where that is all."""
    if "forward" in module.__dict__:
        return "it has a forward of somebody's"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    return None


class Float8Copy:
    """A weight (N, K) in float8, and of what it was made.

    Attributes:
        rows: the weight in float8; None before `follow`.
    """

    def __init__(self, rows: Float8Rows | None = None):
        self.rows = rows
        self._weight: Tensor | None = None
        self._parameters: Sequence[Tensor] = ()
        self._made_of: list[int] = []

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What F.linear is called with, in float8."""
        assert self.rows is not None, "`follow` comes before every forward"
        return float8_linear(x, self.rows, bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return 0 if self._weight is None or self.rows is None else sum(part.nbytes for part in self.rows)

    def follow(self, weight: Tensor, parameters: Sequence[Tensor]) -> None:
        """Be a copy of a weight (N, K), which the parameters together are."""
        self._weight, self._parameters = weight, parameters
        self.renew()

    def renew(self) -> None:
        """Quantize again, in the same memory, where the weight has been written to or lies elsewhere."""
        weight = self._weight
        assert weight is not None, "`follow` says of what it is a copy"
        made_of = [weight.data_ptr(), *map(Tensor.data_ptr, self._parameters), *map(_version, self._parameters)]
        if made_of == self._made_of:
            return
        # What is made in inference mode could never be saved for a backward.
        with torch.inference_mode(False), torch.no_grad():
            made, old = quantize_rows(weight), self.rows
            if old is not None and old.values.shape == made.values.shape and old.values.device == weight.device:
                # Captured passes have its address.
                for part, new in zip(old, made, strict=True):
                    part.copy_(new)
            else:
                self.rows = made
        self._made_of = made_of


def _version(parameter: Tensor) -> int:
    """How often it has been written to; tensors of inference mode do not count."""
    return 0 if parameter.is_inference() else parameter._version


class Float8Linear(nn.Module):
    """Stands in for one linear map."""

    def __init__(self, linear: nn.Module, copy: Float8Copy):
        super().__init__()
        # In a tuple it is no child: the parameters are the base's.
        self._of = (linear,)
        self._copy = copy

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return self._copy(x, self.weight, self.bias)

    @property
    def weight(self) -> Tensor:
        """The linear map's own parameter, for code that asks for its dtype."""
        weight: Tensor = self._of[0].weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The linear map's own."""
        bias: Tensor | None = self._of[0].bias
        return bias


class Float8Maps:
    """The stand-ins for one backbone's linear maps, and the copies that they compute with."""

    def __init__(self, backbone: PreTrainedModel, layers_path: str, *, fused: bool, copies: bool):
        """Find nothing yet.

        Args:
            layers_path: where the layers are in it.
            fused: maps that read one input are one product, as `FusedProjections` has them.
            copies: also weights that are not float8 yet.
        """
        self._backbone = backbone
        self._layers_path = layers_path
        self._fused = FusedProjections(backbone) if fused and copies else None
        self._quantizes = copies
        self._copies: dict[tuple[str, ...], Float8Copy] = {}
        self._found: dict[str, nn.Module] = {}
        self._in_use: list[Float8Copy] = []
        self._left: _AsFound | None = None

    def modules(self) -> Mapping[str, nn.Module]:
        """Path -> what stands in for a linear map there, with copies that are as the weights are.

        The same object for as long as the same maps are there, so that views of it are kept.

        Raises:
            ValueError: there is none any more.
        """
        groups = _NO_GROUPS if self._fused is None else self._fused.modules()
        if self._left is None or not self._left.is_so(groups):
            self._find(groups)
        else:
            self.renew()
        if not self._found:
            raise ValueError(
                "step_options.float8 must be off where no linear map of the layers can be in float8 any more"
            )
        return self._found

    def renew(self) -> None:
        """Make the copies of weights that have been written to again."""
        for copy in self._in_use:
            copy.renew()

    def memory(self) -> int:
        """Bytes of the copies; what torchao keeps is the base's own."""
        return sum(copy.nbytes for copy in self._copies.values())

    def release(self) -> None:
        """Give the copies back, and to fused weights memory of their own."""
        self._left, self._found, self._copies, self._in_use = None, {}, {}, []
        if self._fused is not None:
            self._fused.release()

    def _find(self, groups: Mapping[str, nn.Module]) -> None:
        """Make stand-ins and copies of what is there now."""
        served = {p: m for p, m in _maps_of(self._backbone, self._layers_path).items() if why_not(p, m) is None}
        kept = {path: rows for path, module in served.items() if (rows := kept_float8(module)) is not None}
        found: dict[str, nn.Module] = {
            path: Float8Linear(served[path], Float8Copy(rows))
            for path, rows in kept.items()
            if self._quantizes or lacks_backward(served[path])
        }
        plain = [path for path in served if path not in kept] if self._quantizes else []
        self._in_use = []
        for group in () if self._fused is None else self._fused.whole():
            if set(group.modules).issubset(plain):
                weights = [linear.weight for linear in group.linears]
                group.product = self._copy_of(tuple(group.modules), group.weight, weights)
                found |= group.modules
        for path in plain:
            if path not in found:
                weight = served[path].weight
                found[path] = Float8Linear(served[path], self._copy_of((path,), weight, [weight]))
        self._found = found
        self._left = _AsFound(self._backbone, {p: served[p] for p in plain}, {p: served[p] for p in kept}, groups)

    def _copy_of(self, paths: tuple[str, ...], weight: Any, parameters: Sequence[Any]) -> Float8Copy:
        # Kept for good, whatever is in use: a pass that was captured with it may be replayed again.
        copy = self._copies.setdefault(paths, Float8Copy())
        copy.follow(weight.detach(), parameters)
        self._in_use.append(copy)
        return copy


class _AsFound:
    """What stand-ins were made of, to be asked in every step whether it is still there."""

    def __init__(
        self,
        backbone: nn.Module,
        plain: Mapping[str, nn.Module],
        kept: Mapping[str, nn.Module],
        groups: Mapping[str, nn.Module],
    ) -> None:
        ways = {path: way_down(backbone, path.split(".")) for path in (*plain, *kept)}
        self._plain = LinearsAsFound([place for path in plain for place in ways[path]], list(plain.values()))
        # Their weights have no address.
        self._places = [place for path in kept for place in ways[path]]
        # Nor need another weight be another object: `base.to` swaps what is in it.
        self._kept = [(one._parameters, *_data_of(one._parameters)) for one in kept.values()]
        self._modules = list(kept.values())
        self._groups = groups

    def is_so(self, groups: Mapping[str, nn.Module]) -> bool:
        """Whether it is; `groups` is what fused projections stand in now."""
        return (
            groups is self._groups
            and self._plain.is_so()
            and all(parent._modules.get(name) is child for parent, name, child in self._places)
            and all(all(map(is_, _data_of(own), data)) for own, *data in self._kept)
            and not any(map(_own_code, self._modules))
        )


def _data_of(parameters: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """A weight that torchao keeps, and the tensors in it; None for those that there are not."""
    weight = parameters.get("weight")
    return weight, getattr(weight, "qdata", None), getattr(weight, "scale", None)
