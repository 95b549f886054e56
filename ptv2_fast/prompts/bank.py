"""Banks: the keys and values of several adapters side by side, for a batch whose rows use different ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.attention.prompt_batch import LayerPrompt, LazyPrompt
from ptv2_fast.backbone.sharded_weights import dtype_of
from ptv2_fast.families.family import Family
from ptv2_fast.prompts.encoder import PromptEncoder
from ptv2_fast.prompts.keys_values import pairs_of
from ptv2_fast.prompts.projection import LayerProjections

_Lens = Callable[[list[int], torch.device], Tensor]


def made_together(
    encoders: Sequence[PromptEncoder | None],
    backbone: PreTrainedModel,
    family: Family,
    projections: LayerProjections,
    backend: str,
) -> tuple[LayerPrompt | None, ...] | None:
    """Every layer's bank in a few operations a layer, however many adapters there are; None where they are too unlike.

    Prompts of one length in the same layers are stacked before anything is made of them: one product then projects
    those of all adapters, straight to where attention reads them.

    Args:
        encoders: the adapters' prompts; None for an entry without a prompt.
        projections: of the layers that the encoders prompt.
    """
    present = [encoder for encoder in encoders if encoder is not None]
    alike = {(encoder.injection, encoder.layers, encoder.shape) for encoder in present}
    if len(alike) != 1 or present[0].injection == "shallow" or family.relative_positions or projections.must_wait():
        return None
    first = present[0]
    made = [None if encoder is None else encoder() for encoder in encoders]
    nothing = torch.zeros_like(next(prompts for prompts in made if prompts is not None)) if None in encoders else None
    # (L', P, R, D) or (L', 2, R, Hkv, P, d)
    prompts = torch.stack([_or(own, nothing) for own in made], 2).to(dtype_of(backbone))
    if first.injection == "deep":
        pairs = projections(prompts.flatten(1, 2), backend, len(encoders))
    else:
        pairs = pairs_of(prompts)
    lens = None
    if nothing is not None:
        length = first.shape[-2]
        lens = bank_lens([0 if encoder is None else length for encoder in encoders], prompts.device)
    gates = _gates(encoders)
    banks = {
        layer: LayerPrompt(*pair, bias=gate, lens=lens)
        for layer, pair, gate in zip(first.layers, pairs, gates, strict=True)
    }
    return tuple(banks.get(layer) for layer in range(projections.num_layers))


def _gates(encoders: Sequence[PromptEncoder | None]) -> Sequence[Tensor | None]:
    """(R, H, P) of every prompted layer, zeros for an entry without a gate; None where no entry has one."""
    gates = [None if encoder is None else encoder.gate for encoder in encoders]
    gated = next((gate for gate in gates if gate is not None), None)
    if gated is None:
        layers = next(len(encoder.layers) for encoder in encoders if encoder is not None)
        return [None] * layers
    nothing = torch.zeros_like(gated) if any(gate is None for gate in gates) else None
    return torch.stack([_or(gate, nothing) for gate in gates], 1).unbind(0)


def _or(own: Tensor | None, other: Tensor | None) -> Tensor:
    chosen = other if own is None else own
    assert chosen is not None, "there is another wherever one is missing"
    return chosen


def stack_bank(
    members: list[tuple[LayerPrompt | LazyPrompt | None, ...]],
) -> tuple[LayerPrompt | LazyPrompt | None, ...]:
    """One bank per layer out of the prompts of R adapters, padded to the longest.

    Args:
        members: per adapter, the LayerPrompt (Hkv, P_r, d) of every layer, or None.

    Returns:
        Per layer a bank (R, Hkv, max P, d), with lens (R,) unless all its prompts are equally long; None where no
        adapter prompts the layer.
    """
    known: dict[tuple[int, ...], Tensor] = {}

    def lens_of(lens: list[int], device: torch.device) -> Tensor:
        # The layers of a bank have the same lengths as a rule.
        if tuple(lens) not in known:
            known[tuple(lens)] = bank_lens(lens, device)
        return known[tuple(lens)]

    return tuple(_stack_layer(layer, lens_of) for layer in zip(*members, strict=True))


def bank_lens(lens: Sequence[int], device: torch.device) -> Tensor:
    """(R,) int32 on the device, written by fills: a copy of a list from the host would wait for the device."""
    runs = [(length, len(list(run))) for length, run in groupby(lens)]
    return torch.cat([torch.full((count,), length, dtype=torch.int32, device=device) for length, count in runs])


def _stack_layer(
    prompts: tuple[LayerPrompt | LazyPrompt | None, ...], lens_of: _Lens
) -> LayerPrompt | LazyPrompt | None:
    if all(prompt is None for prompt in prompts):
        return None

    def stacked() -> LayerPrompt:
        return _stacked([p.make() if isinstance(p, LazyPrompt) else p for p in prompts], lens_of)

    return LazyPrompt(stacked) if any(isinstance(p, LazyPrompt) for p in prompts) else stacked()


def _stacked(prompts: Sequence[LayerPrompt | None], lens_of: _Lens) -> LayerPrompt:
    present = [prompt for prompt in prompts if prompt is not None]
    lens = [0 if prompt is None else prompt.keys.shape[1] for prompt in prompts]
    longest = max(lens)
    keys = _padded([None if p is None else p.keys for p in prompts], longest)
    values = _padded([None if p is None else p.values for p in prompts], longest)
    bias = None
    if any(prompt.bias is not None for prompt in present):
        gates = [None if p is None or p.bias is None else p.bias[..., None] for p in prompts]
        bias = _padded(gates, longest)[..., 0]
    return LayerPrompt(keys, values, bias, None if min(lens) == longest else lens_of(lens, present[0].keys.device))


def _padded(rows: Sequence[Tensor | None], longest: int) -> Tensor:
    """(R, heads, longest, width): rows (heads, P_r, width) with zeros behind them, or nothing but zeros for None."""
    like = next(row for row in rows if row is not None)
    nothing = None
    if any(row is None for row in rows):
        nothing = like.new_zeros(like.shape[0], longest, like.shape[2])
    full = (_or(row, nothing) for row in rows)
    return torch.stack(
        [row if row.shape[1] == longest else F.pad(row, (0, 0, 0, longest - row.shape[1])) for row in full]
    )
