"""Who may be timed: a step's loss and prompt gradient against the same function in float32, on the cell's own batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.attention.verify import ERROR_FACTOR, relative_error
from benchmarks.step.batches import Batch, Prompts, make_batch, make_prompts
from benchmarks.step.forms import FORM_BUILDERS, FORMS, Bound, deep_form, head_of, prefix_form, task_loss
from benchmarks.step.models import build_base, float_twin
from ptv2_fast.reference import backbones
from ptv2_fast.reference.literal import literal_deep, literal_prefix

# What a result may be off in any case, by dtype: rounding over tens of layers.
_FLOOR = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 2e-4}
# Tokens, prompts included, that one step of the judge holds in float32; in an 8B model each takes half a megabyte for
# every layer.
_CHUNK_TOKENS = {"cuda": 2048, "cpu": 8192}
# With less memory than this a card holds a quarter as many.
_ROOMY = 120 * 10**9


@dataclass(frozen=True)
class Expected:
    """What a form must give on a batch, and how far the same form in the cell's dtype is off."""

    loss: float
    gradient: Tensor
    allowed: float

    def entry(self, loss: float, gradient: Tensor) -> dict[str, object]:
        """The record of a provider's results: "passed" or "wrong", with errors."""
        errors = {
            "loss": abs(loss - self.loss) / max(abs(self.loss), 1e-12),
            "gradient": relative_error(gradient, self.gradient.double()),
        }
        bad = [name for name, error in errors.items() if not error <= self.allowed]
        entry: dict[str, object] = {
            "status": "wrong" if bad else "passed",
            "errors": {name: error if math.isfinite(error) else None for name, error in errors.items()},
            "allowed": self.allowed,
        }
        if bad:
            entry["reason"] = "; ".join(
                f"{name}: relative error {errors[name]:.1e}, allowed {self.allowed:.1e}" for name in bad
            )
        return entry


def evaluate(bound: Bound, batch: Batch) -> tuple[float, Tensor]:
    """Loss and gradient of one forward and backward, without a step of the optimizer."""
    arguments = bound.prepare(batch)
    return run_once(bound, arguments)


def run_once(bound: Bound, arguments: tuple) -> tuple[float, Tensor]:
    """Loss and gradient for arguments that `prepare` made; leaves no gradient behind."""
    bound.arm()
    if bound.compiled:
        torch.compiler.cudagraph_mark_step_begin()
    if bound.take is not None:
        loss = bound.take(*arguments)
    else:
        loss = bound.forward(*arguments)
        loss.backward()
    value, gradient = float(loss.detach()), bound.gradient(arguments).detach().clone()
    clear_gradients(bound, arguments)
    return value, gradient


def clear_gradients(bound: Bound, arguments: tuple) -> None:
    """Forget the gradients of everything that a step differentiates; a captured step keeps its own."""
    if bound.take is not None:
        return
    for leaf in (*bound.trained, *arguments):
        if isinstance(leaf, Tensor) and leaf.is_leaf:
            leaf.grad = None


class StepJudge:
    """Expected results of the three forms for the batches of a group of cells.

    Judging takes a float32 copy of the model, which is made when first asked and dropped by `close`.
    """

    def __init__(self, base: nn.Module, prompts: Prompts):
        self._base, self._prompts = base, prompts
        self._exact: dict[str, Bound] = {}
        self._results: dict[tuple[str, int], tuple[float, Tensor]] = {}
        self._expected: dict[tuple[str, int], Expected] = {}
        self._single: nn.Module | None = None

    def expected(self, form: str, batch: Batch) -> Expected:
        """What `form` must give on a batch."""
        key = (form, id(batch))
        if key not in self._expected:
            self._expected[key] = self._judge(form, batch)
        return self._expected[key]

    def exactly(self, form: str, batch: Batch) -> tuple[float, Tensor]:
        """Loss and gradient of the copy in float32; known after `close` where it was asked for before."""
        key = (form, id(batch))
        if key not in self._results:
            if self._base.dtype == torch.float32:
                self._single = self._base
            elif self._single is None:
                self._single = float_twin(self._base)
            if form not in self._exact:
                self._exact[form] = FORM_BUILDERS[form](self._single, self._prompts)
            self._results[key] = in_chunks(self._exact[form], batch, self._prompts.prefix.shape[3])
        return self._results[key]

    def close(self) -> None:
        """Free the copy of the model; what was found with it stays known."""
        self._exact, self._single = {}, None

    def _judge(self, form: str, batch: Batch) -> Expected:
        loss, gradient = self.exactly(form, batch)
        floor = _FLOOR[self._base.dtype]
        if self._base.dtype == torch.float32:
            return Expected(loss, gradient, floor)
        rounded_loss, rounded = evaluate(FORM_BUILDERS[form](self._base, self._prompts), batch)
        off = max(relative_error(rounded, gradient.double()), abs(rounded_loss - loss) / max(abs(loss), 1e-12))
        return Expected(loss, gradient, max(ERROR_FACTOR * off, floor))


def in_chunks(bound: Bound, batch: Batch, prompt_length: int) -> tuple[float, Tensor]:
    """Loss and gradient of a batch, some rows at a time."""
    width = batch.input_ids.shape[1] + prompt_length
    rows = max(1, _chunk_tokens(batch.input_ids.device) // width)
    counts = [_targets(batch.rows(i, i + rows)) for i in range(0, len(batch.lengths), rows)]
    loss, gradients = 0.0, []
    for place, count in enumerate(counts):
        part = batch.rows(place * rows, (place + 1) * rows)
        value, gradient = evaluate(bound, part)
        loss += value * count / sum(counts)
        gradients.append(gradient * (count / sum(counts)))
    # Prompts are shared by the rows; embeddings are the rows' own.
    return loss, sum(gradients) if bound.trained else torch.cat(gradients)


def _chunk_tokens(device: torch.device) -> int:
    tokens = _CHUNK_TOKENS[device.type]
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < _ROOMY:
        return tokens // 4
    return tokens


def _targets(batch: Batch) -> int:
    """How many terms the mean of a batch's loss has."""
    return len(batch.lengths) if batch.labels.dim() == 1 else int((batch.labels[:, 1:] != -100).sum())


def forms_follow_the_reference(device: torch.device) -> dict[str, float]:
    """Relative errors of the forms of this module's judge against the package's literal forms, on tiny models.

    Both in float64, with padding: {"tiny-bert deep": gradient error, ...}.
    """
    errors = {}
    for name in ("tiny-bert", "tiny-qwen3"):
        base = build_base(name, device, torch.float64)
        causal = backbones.is_causal(base.base_model)
        prompts = make_prompts(base, 5)
        batch = make_batch(base, (9, 4, 7), causal=causal)
        for form in FORMS[:2]:
            builder = deep_form if form == "deep" else prefix_form
            _, gradient = evaluate(builder(base, prompts), batch)
            reference = _reference_gradient(base, prompts, batch, form)
            errors[f"{name} {form}"] = relative_error(gradient, reference.double())
    return errors


def _reference_gradient(base: nn.Module, prompts: Prompts, batch: Batch, form: str) -> Tensor:
    leaf = (prompts.deep if form == "deep" else prompts.prefix).double().requires_grad_()
    inputs = (batch.input_ids, batch.attention_mask)
    if form == "deep":
        hidden = literal_deep(base.base_model, leaf, *inputs)
    else:
        length = leaf.shape[3]
        hidden = literal_prefix(base.base_model, leaf[:, 0], leaf[:, 1], *inputs, position_offset=length)
    return torch.autograd.grad(task_loss(base, hidden, batch.labels, head_of(base)), leaf)[0]
