"""Frozen maps in float8 on a card: right against float64, and how long a map and a decoder's step take beside bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import environment
from benchmarks.context import Context
from benchmarks.health import entry_of
from benchmarks.measure import QUICK, SMALL, cell_stream, time_interleaved
from benchmarks.step.models import FIRST_WORD, build_base
from ptv2_fast import PTuningV2Config, StepOptions, get_ptv2_model
from ptv2_fast.backbone import float8_linear as float8
from ptv2_fast.backbone.float8_linear import Float8Rows, quantize_rows, scaled_product

# Tokens, inputs, outputs: one token, a count that no tile has, and a layer's largest map for a batch.
_MAPS, _TINY_MAPS = ((1, 1024, 3072), (77, 1024, 1024), (4096, 4096, 14336)), ((5, 32, 48),)
# What a result in bf16 may be off by: half a step of its eight binary digits, and as much for the sum.
_ALLOWED = 2.0**-8
# A layer is what is compared: four of them, and the head, are read from memory in no time.
_LAYERS, _ROWS, _TOKENS, _PROMPT = 4, 8, 512, 128
# The compiler takes about that long over the layers, with both ways.
_COMPILE_SECONDS = 25.0
_OFF = {"unpad": False, "last_rows": False, "cuda_graphs": False, "labelled_rows_loss": True}
_WAYS = {
    "bf16": StepOptions(**_OFF, fused_projections=True),
    "float8": StepOptions(**_OFF, fused_projections=True, float8=True),
}


def run(context: Context) -> str:
    """Judge products, then time one map and whole steps; gives the state of the run.

    Raises:
        BrokenContext: the device is unusable.
    """
    red = False
    for tokens, inputs, outputs in _TINY_MAPS if context.tiny else _MAPS:
        red |= _put(context, f"float8-map-M{tokens}-K{inputs}-N{outputs}", _map, tokens, inputs, outputs)
    return "red" if _put(context, "float8-step", _step) or red else "complete"


def _put(context: Context, name: str, measure: Callable[..., dict[str, object]], *sizes: int) -> bool:
    """Measure a cell and record it; gives whether it is red."""
    cell: dict[str, object] = {"id": name, "date": environment.now()}
    try:
        with cell_stream(context.device):
            cell |= measure(context, *sizes)
    except Exception as error:
        cell |= entry_of(error, context.device)
    context.result.put(cell)
    times = {way: entry.get("ms") for way, entry in cell.get("peers", {}).items()}
    context.say(f"{name}: {cell['status']} {cell.get('reason', '')} {times}")
    return cell["status"] not in ("passed", "refused")


def _refused(device: torch.device) -> dict[str, object] | None:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability >= (8, 9):
        return None
    return {"status": "refused", "reason": f"compute capability {capability}"}


def _map(context: Context, tokens: int, inputs: int, outputs: int) -> dict[str, object]:
    """Both products of one map against float64, and their time beside a product in bf16."""
    if refused := _refused(context.device):
        return refused
    torch.manual_seed(0)
    dtype = torch.bfloat16
    x, w, g = (
        torch.randn(shape, device=context.device, dtype=dtype)
        for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    weight, rows = quantize_rows(w), quantize_rows(x)
    gradient = quantize_rows(g * weight.scales.T, float8.GRADIENTS)
    errors = {
        "y": _error(scaled_product(rows, weight, None, dtype), _exact(rows) @ _exact(weight).T),
        "dx": _error(float8.input_gradient(g, weight, dtype), _exact(gradient) @ weight.values.double()),
        "y in bf16": _error(scaled_product(rows, weight, None, dtype), x.double() @ w.double().T),
    }
    wrong = [name for name in ("y", "dx") if not errors[name] < _ALLOWED]
    wrong += [name for name, same in _kernels_agree(x, g, weight).items() if not same]
    calls = {
        "bf16": lambda: F.linear(x, w),
        "float8": lambda: float8.float8_linear(x, weight, None),
        "float8 product alone": lambda: scaled_product(rows, weight, None, dtype),
        "input quantized alone": lambda: quantize_rows(x),
        "bf16 backward": lambda: g @ w,
        "float8 backward": lambda: float8.input_gradient(g, weight, dtype),
        "weight transposed alone": lambda: float8.transposed(weight.values),
    }
    return {
        "status": "wrong" if wrong else "passed",
        "reason": ", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
        "peers": _timed(calls, context),
    }


def _kernels_agree(x: Tensor, g: Tensor, weight: Float8Rows) -> dict[str, bool]:
    """Whether what eager calls quantize and transpose by kernels is to the bit what torch's operations make."""
    factors = weight.scales.view(-1)
    # A subclass is what kernels do not take.
    plain = [quantize_rows(x.as_subclass(_Plain)), quantize_rows(g.as_subclass(_Plain), float8.GRADIENTS, factors)]
    own = [quantize_rows(x), quantize_rows(g, float8.GRADIENTS, factors)]
    same = [all(torch.equal(*(part.view(torch.uint8) for part in pair)) for pair in zip(*two, strict=True))
            for two in zip(plain, own, strict=True)]  # fmt: skip
    turned = float8.transposed(weight.values).view(torch.uint8)
    return {
        "inputs as torch's": same[0],
        "gradients as torch's": same[1],
        "transposed": torch.equal(turned, weight.values.view(torch.uint8).T),
    }


class _Plain(Tensor):
    """A tensor like any other."""


def _step(context: Context) -> dict[str, object]:
    """A decoder's forward and backward with its maps in bf16 and in float8, and both with compiled layers."""
    if refused := _refused(context.device):
        return refused
    name, layers = ("tiny-llama", None) if context.tiny else ("llama-3-8b", _LAYERS)
    base = build_base(name, context.device, torch.bfloat16, layers=layers)
    rows, tokens, prompt = (2, 9, 4) if context.tiny else (_ROWS, _TOKENS, _PROMPT)
    ids = torch.randint(FIRST_WORD, base.config.vocab_size, (rows, tokens), device=context.device)
    calls = {way: _taking(base, prompt, options, ids) for way, options in _WAYS.items()}
    (plain, exact), (loss, gradient) = (call() for call in calls.values())
    # Losses of random weights are alike whatever is computed; gradients are not.
    likeness = float(torch.cosine_similarity(exact.flatten(), gradient.flatten(), 0))
    right = likeness > 0.9 and abs(loss - plain) < 0.05 * plain
    peers = _timed(calls, context)
    if context.left > _COMPILE_SECONDS and not context.tiny:
        # The compiler makes one kernel of what quantizes the rows.
        compiled = {f"{way}, compiled layers": replace(on, compile_layers=True) for way, on in _WAYS.items()}
        peers |= _timed({way: _taking(base, prompt, options, ids) for way, options in compiled.items()}, context)
    return {
        "status": "passed" if right else "wrong",
        "reason": f"losses {plain:.4f} and {loss:.4f}, cosine of the prompts' gradients {likeness:.4f}",
        "case": {"model": name, "layers": layers, "B": rows, "N": tokens, "P": prompt},
        "peers": peers,
    }


def _taking(base: nn.Module, prompt: int, options: StepOptions, ids: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that takes a step: its loss, and the prompts' gradient."""
    torch.manual_seed(1)
    # One for each way: a wrapper keeps the views of its last step alone.
    model = get_ptv2_model(base, PTuningV2Config("CAUSAL_LM", num_virtual_tokens=prompt)).train()
    model.step_options = options
    (trained,) = (p for p in model.parameters() if p.requires_grad)

    def take() -> tuple[Tensor, Tensor]:
        trained.grad = None
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), trained.grad

    return take


def _timed(calls: dict[str, Callable[[], object]], context: Context) -> dict[str, dict[str, object]]:
    times = time_interleaved(calls, context.device, QUICK if context.tiny else SMALL)
    return {name: {"status": "timed", **timing.as_dict()} for name, timing in times.items()}


def _exact(rows: Float8Rows) -> Tensor:
    return rows.values.double() * rows.scales.double()


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
