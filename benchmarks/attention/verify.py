"""Who may be timed: results against the literal form in higher precision, on the case's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention.cases import Case
from benchmarks.attention.inputs import Inputs
from ptv2_fast.reference.attention import prompt_attention as literal

GRADIENTS = ("q", "k", "v", "prompt_k", "prompt_v")
# A result may be off by this many times the error of the literal form in the case's own dtype ...
ERROR_FACTOR = 2.0
# ... and never has to be closer than the rounding of its own output.
_FLOOR = {"bf16": 8e-3, "fp16": 1e-3, "fp32": 1e-5, "fp64": 1e-12}
# Elements of a score matrix in float64 that one step of the judge may hold.
_SCORES = {"cuda": 2**27, "cpu": 2**20}
# Beyond this many scores in a case, two key/value heads stand for all, or one where rows are very long.
_ALL_HEADS = {"cuda": 2**30, "cpu": 2**24}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; inf where a shape or a NaN is in the way."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - expected).norm()
    error = float(difference / expected.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one provider."""

    errors: dict[str, float]
    allowed: dict[str, float]

    @property
    def wrong(self) -> list[str]:
        """The tensors that are off, worst first."""
        off = [name for name, error in self.errors.items() if not error <= self.allowed[name]]
        return sorted(off, key=lambda name: -self.errors[name] / self.allowed[name])

    @property
    def reason(self) -> str:
        """One line for the record; empty when all is well."""
        return "; ".join(
            f"{name}: relative error {self.errors[name]:.1e}, allowed {self.allowed[name]:.1e}" for name in self.wrong
        )


@dataclass(frozen=True)
class Judge:
    """The expected results of one case, for some rows and key/value heads of it.

    Attributes:
        rows: row numbers compared; with a subset, `grad_out` must be zero elsewhere.
        kv_heads: key/value heads compared, with every query head of theirs.
        expected: "out" and the names of `GRADIENTS`, float64.
        allowed: the relative error allowed to each.
    """

    case: Case
    rows: tuple[int, ...]
    kv_heads: tuple[int, ...]
    real: Tensor
    expected: dict[str, Tensor]
    allowed: dict[str, float]

    def verdict(self, results: Mapping[str, Tensor]) -> Verdict:
        """Compare a provider's results; it may leave gradients out, never the output.

        Args:
            results: "out" (B, H, N, d) and gradients in the shapes of `Inputs`.
        """
        errors = {
            name: relative_error(self._slice(name, result), self.expected[name]) for name, result in results.items()
        }
        return Verdict(errors, {name: self.allowed[name] for name in errors})

    def _slice(self, name: str, result: Tensor) -> Tensor:
        """The part of a result that was judged, zero at padding where padding has no meaning."""
        part = _part(name, result, self.case, self.rows, self.kv_heads)
        if name in ("out", "q"):
            part = part.masked_fill(~self.real[:, None, :, None], 0.0)
        return part


def make_judge(case: Case, inputs: Inputs, *, bank: bool = False, rows=None) -> Judge:
    """Run the literal form in float64 and in the case's dtype.

    Args:
        case, inputs: the cell and its tensors.
        bank: each row uses its entry of the bank instead of the one prompt.
        rows: the rows to judge, all when None; `inputs.grad_out` must be zero in the others.
    """
    rows = tuple(range(case.B)) if rows is None else tuple(rows)
    device = inputs.q.device.type
    scores = len(rows) * case.H * case.N * (case.P + case.N)
    kv_heads = tuple(range(case.Hkv))
    if scores > _ALL_HEADS[device] and case.Hkv > 2:
        pair = 2 * case.group * case.N * (case.P + case.N)
        kv_heads = (0, case.Hkv - 1) if pair <= 4 * _SCORES[device] else (case.Hkv - 1,)
    real = inputs.real[list(rows)]
    exact = _literal_results(case, inputs, rows, kv_heads, bank, torch.float64)
    rounded = _literal_results(case, inputs, rows, kv_heads, bank, case.torch_dtype)
    allowed = {
        name: max(ERROR_FACTOR * relative_error(rounded[name], exact[name]), _FLOOR[case.dtype]) for name in exact
    }
    return Judge(case, rows, kv_heads, real, exact, allowed)


def _part(name: str, tensor: Tensor, case: Case, rows, kv_heads) -> Tensor:
    """The judged rows and heads of a result or an input, whatever its shape is."""
    kv = torch.tensor(kv_heads, device=tensor.device)
    if name.startswith("prompt"):
        return tensor.index_select(-3, kv)
    heads = kv
    if name in ("out", "q"):
        heads = (kv[:, None] * case.group + torch.arange(case.group, device=kv.device)).flatten()
    return tensor[list(rows)].index_select(1, heads)


def _literal_results(case, inputs, rows, kv_heads, bank, dtype) -> dict[str, Tensor]:
    """Output and gradients of the literal form, a few rows at a time; sums over rows in float64."""
    scores_of_a_row = len(kv_heads) * case.group * case.N * (case.P + case.N)
    chunk = max(1, _SCORES[inputs.q.device.type] // max(1, scores_of_a_row))
    prompts = (inputs.bank_k, inputs.bank_v) if bank else (inputs.prompt_k, inputs.prompt_v)
    prompts = [_part("prompt", x, case, rows, kv_heads).to(dtype) for x in prompts]
    if not bank:
        prompts = [x[None] for x in prompts]
    pieces: dict[str, list[Tensor]] = {name: [] for name in ("out", "q", "k", "v")}
    sums = [torch.zeros_like(x, dtype=torch.float64) for x in prompts]
    for start in range(0, len(rows), chunk):
        some = rows[start : start + chunk]
        q, k, v, grad_out = (
            _part(name, x, case, some, kv_heads).to(dtype)
            for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v), ("q", inputs.grad_out))
        )
        leaves = [x.detach().requires_grad_(case.gradients) for x in (q, k, v, *prompts)]
        out = literal(
            *leaves,
            key_mask=None if inputs.key_mask is None else inputs.key_mask[list(some)],
            prompt_index=inputs.prompt_index[list(some)] if bank else None,
            causal=case.causal,
            scale=case.d**-0.5,
        )
        real = inputs.real[list(some)][:, None, :, None]
        pieces["out"].append(out.detach().masked_fill(~real, 0.0))
        if case.gradients:
            grads = torch.autograd.grad(out, leaves, grad_out)
            for name, grad in zip(("q", "k", "v"), grads, strict=False):
                pieces[name].append(grad)
            for total, grad in zip(sums, grads[3:], strict=False):
                total += grad
    results = {name: torch.cat(parts) for name, parts in pieces.items() if parts}
    if case.gradients:
        sums = sums if bank else [total[0] for total in sums]
        results |= {"prompt_k": sums[0].to(dtype), "prompt_v": sums[1].to(dtype)}
    return {name: x.double() if dtype == torch.float64 else x for name, x in results.items()}
