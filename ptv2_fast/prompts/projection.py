"""Prompt states to keys and values: the layers' own projections, all layers together where a kernel can."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.attention.autocast import autocast_dtype
from ptv2_fast.attention.triton_backend import check_available, unavailable_reason
from ptv2_fast.backbone.projection import Projection
from ptv2_fast.backbone.sharded_weights import weights_owner
from ptv2_fast.families.family import Family

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
        self._tables: tuple[tuple, list] | None = None

    def __call__(self, states: Tensor, backend: str, entries: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, (Hkv, P, d) each, that each layer makes of its prompt states; with `entries` a bank.

        Args:
            states: (L', P, D), in the backbone's dtype; of R entries (L', P * R, D), token by token.
            backend: of `prompt_attention`; "triton", or "auto" on CUDA, projects by the kernel.
            entries: R, where keys and values are to be (R, Hkv, P, d).
        """
        per_layer = [self._family.projections(self._backbone, layer) for layer in self._layers]
        together = self._normed_together(states, backend)
        if together is not None and _kernel_serves(together, per_layer, backend):
            return self._all_finished(self._by_kernel(together, per_layer), entries)
        normed = [
            self._family.attention_input(self._backbone, layer, state)
            for layer, state in zip(self._layers, states.unbind(0), strict=True)
        ]
        if _kernel_serves(normed[0], per_layer, backend):
            return self._all_finished(self._by_kernel(torch.stack(normed), per_layer), entries)
        keys, values = [
            [project(x) for x, project in zip(normed, side, strict=True)] for side in zip(*per_layer, strict=True)
        ]
        return [self._finished(*flat, entries=entries) for flat in zip(self._layers, keys, values, strict=True)]

    def _normed_together(self, states: Tensor, backend: str) -> Tensor | None:
        """(L', P, D) what all layers' projections read, for the kernel; None where each layer has to be asked."""
        if not _kernel_is_wanted(states, backend):
            return None
        return self._family.attention_inputs(self._backbone, self._layers, states)

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

    def _by_kernel(self, normed: Tensor, per_layer: list[tuple[Projection, Projection]]) -> tuple[Tensor, ...]:
        """(L', P, Hkv * d) keys and values from normed states (L', P, D)."""
        from ptv2_fast.kernels.prompt_projection import WeightTable, prompt_projection

        weights = [p.weight for pair in per_layer for p in pair if p.weight is not None]
        addresses = tuple((weight.data_ptr(), weight.dtype) for weight in weights)
        if self._tables is None or self._tables[0] != addresses:
            tables = []
            for side in zip(*per_layer, strict=True):
                biases = [p.bias for p in side] if side[0].bias is not None else None
                tables.append(WeightTable([p.weight for p in side], biases))
            self._tables = (addresses, tables)
        return tuple(prompt_projection(normed, table) for table in self._tables[1])


def _kernel_is_wanted(states: Tensor, backend: str) -> bool:
    """Whether the kernel is asked for; under autocast and the compiler torch's own product runs."""
    wanted = backend == "triton" or (backend == "auto" and states.is_cuda)
    return wanted and not torch.compiler.is_compiling() and autocast_dtype(states.device) is None


def _kernel_serves(normed: Tensor, per_layer: list[tuple[Projection, Projection]], backend: str) -> bool:
    """Whether the kernel takes the states and the weights."""
    if not _kernel_is_wanted(normed, backend):
        return False
    # The kernel's table keeps the addresses of weights, so they must be the base's own, of one dtype.
    projections = [projection for pair in per_layer for projection in pair]
    plain = all(p.weight is not None and p.in_place and p.weight.dtype == normed.dtype for p in projections)
    if not plain or normed.dtype not in _KERNEL_DTYPES:
        return False
    if backend == "triton":
        check_available(normed.device)
    return unavailable_reason(normed.device) is None
