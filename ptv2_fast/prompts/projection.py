"""Prompt states to keys and values: the layers' own projections, all layers together where a kernel can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.attention.autocast import autocast_dtype
from ptv2_fast.attention.triton_backend import check_available, unavailable_reason
from ptv2_fast.backbone.linears_as_found import LinearsAsFound, way_down
from ptv2_fast.backbone.projection import Projection
from ptv2_fast.backbone.sharded_weights import weights_owner
from ptv2_fast.families.family import Family

if TYPE_CHECKING:
    from ptv2_fast.kernels.prompt_projection import WeightTable

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class LayerProjections:
    """The frozen key and value projections of some layers of a backbone.

    Under the triton backend keys take one launch for all layers and values another, instead of two small matrix
    products a layer. The kernel reads the weights where they are; their addresses are looked up again when a weight
    has moved.

    Attributes:
        num_layers: of the whole backbone.
    """

    def __init__(self, backbone: PreTrainedModel, family: Family, layers: Sequence[int]):
        self._backbone = backbone
        self._family = family
        self._layers = tuple(layers)
        # A configuration is slow to read, and every step asks.
        sizes = family.sizes(backbone)
        self._head_dim, self.num_layers = sizes.head_dim, sizes.num_layers
        # What was found when it was last looked for, kept as long as it is so.
        self._found: _Found | None = None

    def __call__(self, states: Tensor, backend: str, entries: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, (Hkv, P, d) each, that each layer makes of its prompt states; with `entries` a bank.

        Args:
            states: (L', P, D), in the backbone's dtype; of R entries (L', P * R, D), token by token.
            backend: of `prompt_attention`; "triton", or "auto" on CUDA, projects by the kernel.
            entries: R, where keys and values are to be (R, Hkv, P, d).
        """
        found = self._find()
        per_layer = found.per_layer
        together = self._normed_together(states, found)
        if together is not None and found.serves(together, backend):
            return self._all_finished(found.project(together), entries)
        normed = [
            state if together is not None else self._family.attention_input(self._backbone, layer, state)
            for layer, state in zip(self._layers, (states if together is None else together).unbind(0), strict=True)
        ]
        if found.serves(normed[0], backend):
            return self._all_finished(found.project(torch.stack(normed)), entries)
        keys, values = [
            [project(x) for x, project in zip(normed, side, strict=True)] for side in zip(*per_layer, strict=True)
        ]
        if together is not None:
            return self._all_finished((torch.stack(keys), torch.stack(values)), entries)
        return [self._finished(*flat, entries=entries) for flat in zip(self._layers, keys, values, strict=True)]

    def _normed_together(self, states: Tensor, found: _Found) -> Tensor | None:
        """(L', P, D) what all layers' projections read; None where each layer has to be asked: inside the compiler,
        under autocast, and where not all weights are where the states are."""
        if torch.compiler.is_compiling() or autocast_dtype(states.device) is not None:
            return None
        if not found.is_on(states.device):
            return None
        # A norm reads them several times; a pass has one way to the parameter, where gradients of passes add up.
        return self._family.attention_inputs(self._backbone, self._layers, states.view_as(states))

    def _all_finished(self, made: tuple[Tensor, ...], entries: int | None) -> list[tuple[Tensor, Tensor]]:
        """`_finished` of all layers' projected keys and values (L', P, Hkv * d), or a bank's (L', P * R, Hkv * d)."""
        keys, values = made
        tokens = keys.shape[1] // (entries or 1)
        shape = (len(self._layers), tokens, -1, self._head_dim)
        finished = self._family.finish_all_keys(self._backbone, self._layers, keys.reshape(shape))
        if finished is None:
            return [self._finished(*flat, entries=entries) for flat in zip(self._layers, keys, values, strict=True)]
        sides = (finished, values.reshape(shape))
        if entries is None:
            keys, values = (side.transpose(1, 2) for side in sides)
        else:
            keys, values = (side.unflatten(2, (entries, -1)).permute(0, 2, 3, 1, 4) for side in sides)
        return list(zip(keys.unbind(0), values.unbind(0), strict=True))

    def must_wait(self) -> bool:
        """Whether each layer's weights are there only while that layer runs: prompts are then made `of_layer`."""
        return weights_owner((self._backbone,), self._family.layers(self._backbone)) is not None

    def of_layer(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (Hkv, P, d) each, that one layer makes of its prompt states (P, D), called while it runs."""
        pair = self._family.projections(self._backbone, layer)
        # Who brings the weights may bring them in another dtype than the one they are kept in.
        dtypes = (p.dtype for p in pair[0].module.parameters() if p.is_floating_point())
        normed = self._family.attention_input(self._backbone, layer, states.to(next(dtypes, states.dtype)))
        keys, values = (project(normed) for project in pair)
        return self._finished(layer, keys, values)

    def _finished(self, layer: int, keys: Tensor, values: Tensor, entries: int | None = None) -> tuple[Tensor, Tensor]:
        """Projected keys and values (P, Hkv * d) as attention reads them, (Hkv, P, d); a bank of (P * R, Hkv * d).

        To the family the heads of all entries are heads of one token: what it does to keys depends on positions.
        """
        tokens = keys.shape[0] // (entries or 1)
        keys, values = (flat.reshape(tokens, -1, self._head_dim) for flat in (keys, values))
        keys = self._family.finish_keys(self._backbone, layer, keys)  # (P, Hkv, d), or (P, R * Hkv, d)
        if entries is None:
            return keys.transpose(0, 1), values.transpose(0, 1)
        keys, values = (flat.unflatten(1, (entries, -1)).permute(1, 2, 0, 3) for flat in (keys, values))
        return keys, values

    def _find(self) -> _Found:
        """The projections of all layers, as they are."""
        # The compiler follows the family's own code; what a trace has found of a part of a weight is of that trace.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return _Found(self._all())
        found = self._found
        if found is None or not found.is_so():
            found = _Found(self._all())
            found.look_at(self._backbone)
            self._found = found
        return found

    def _all(self) -> list[tuple[Projection, Projection]]:
        return [self._family.projections(self._backbone, layer) for layer in self._layers]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None}


class _Found:
    """Projections of some layers, and what the kernel has to know of them.

    Attributes:
        per_layer: (of keys, of values) of each layer.
    """

    def __init__(self, per_layer: list[tuple[Projection, Projection]]) -> None:
        self.per_layer = per_layer
        self._all = [projection for pair in per_layer for projection in pair]
        # Of all weights, where the kernel can read them.
        self._dtype: torch.dtype | None = None
        self._as_found: LinearsAsFound | None = None
        self._tables: list[WeightTable] | None = None

    def look_at(self, backbone: nn.Module) -> None:
        """Note how they are in the backbone, and whether the kernel can read all weights where they are.

        It keeps their addresses and gives them no gradient, so they must be the base's own, of one dtype and frozen.
        """
        if any(parameter.requires_grad for p in self._all for parameter in p.module.parameters()):
            return
        dtypes = {None if p.weight is None or not p.in_place else p.weight.dtype for p in self._all}
        if len(dtypes) == 1 and None not in dtypes:
            (self._dtype,) = dtypes
            self._as_found = _as_found(backbone, [p.module for p in self._all])

    def is_on(self, device: torch.device) -> bool:
        """Whether every map is a weight, on this device."""
        return all(p.weight is not None and p.weight.device == device for p in self._all)

    def is_so(self) -> bool:
        """Whether they are known to be as they were."""
        return self._as_found is not None and self._as_found.is_so()

    def serves(self, normed: Tensor, backend: str) -> bool:
        """Whether the kernel takes the states and the weights."""
        if not _kernel_is_wanted(normed, backend):
            return False
        if normed.dtype not in _KERNEL_DTYPES or normed.dtype != self._dtype:
            return False
        if backend == "triton":
            check_available(normed.device)
        return unavailable_reason(normed.device) is None

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(L', P, Hkv * d) keys and values from normed states (L', P, D), by the kernel."""
        from ptv2_fast.kernels.prompt_projection import WeightTable, prompt_projections

        tables = self._tables
        if tables is None:
            tables = []
            for side in zip(*self.per_layer, strict=True):
                biases = [p.bias for p in side] if side[0].bias is not None else None
                tables.append(WeightTable([p.weight for p in side], biases))
            self._tables = tables
        keys, values = prompt_projections(normed, tables)
        return keys, values


def _as_found(backbone: nn.Module, linears: Sequence[nn.Module]) -> LinearsAsFound | None:
    """How the linear maps are in the backbone; None where one is not a part of it."""
    paths = {id(module): path.split(".") for path, module in backbone.named_modules()}
    if any(id(linear) not in paths for linear in linears):
        return None
    unique = {id(linear): linear for linear in linears}
    places = [place for own in unique for place in way_down(backbone, paths[own])]
    return LinearsAsFound(places, list(unique.values()))


def _kernel_is_wanted(states: Tensor, backend: str) -> bool:
    """Whether the kernel is asked for; under autocast and the compiler torch's own product runs."""
    wanted = backend == "triton" or (backend == "auto" and states.is_cuda)
    return wanted and not torch.compiler.is_compiling() and autocast_dtype(states.device) is None
