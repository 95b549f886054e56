"""The three functions that a step may compute, written out with PyTorch alone: what judges, and what peers start from.

deep    every layer's prompts concatenated to its input and sliced off its output: the literal form
prefix  every layer's keys and values get P trained rows in front, concatenated inside attention
plain   no prompt: the frozen model, differentiated by its input embeddings
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.step.batches import Batch, Prompts
from benchmarks.step.models import classifier, twin
from ptv2_fast.reference import backbones

FORMS = ("deep", "prefix", "plain")
_JOINED = "benchmark_joined_keys"


@dataclass
class Bound:
    """One way of computing a step's loss, bound to a model.

    Attributes:
        model: what runs.
        forward: (*arguments) -> loss, a scalar.
        prepare: (batch) -> arguments; what a loop does once for a batch, outside the timing.
        trained: the parameters an optimizer gets; none for "plain".
        gradient: (arguments) -> the gradient after backward, in the layout of `Prompts`, or that of the embeddings.
        arm: called before forward, outside the timing: sets switches of a model that several providers share.
        logits: of "prefix" on a causal model, (input_ids, positions, mask, which tokens) -> logits at those.
        compiled: runs CUDA graphs of torch.compile, which must be told where a step begins.
        settle: runs before a result is judged: the first ones of a graph warm up and record.
        take: (*arguments) -> loss, of a provider whose optimizer is part of what it runs: the whole step instead of
            `forward`. It learns nothing before `learn(rate)` is called, and leaves its gradient behind.
        learn: sets the learning rate of `take`.
        facts: what the record says of this provider beside its times.
        forget: drops what was recorded of earlier steps: they were judged without dropout.
    """

    model: nn.Module
    forward: Callable[..., Tensor]
    prepare: Callable[[Batch], tuple[Tensor | None, ...]]
    trained: list[Tensor]
    gradient: Callable[[tuple], Tensor]
    arm: Callable[[], None] = field(default=lambda: None)
    compiled: bool = False
    settle: int = 1
    take: Callable[..., Tensor] | None = None
    learn: Callable[[float], None] = field(default=lambda rate: None)
    logits: Callable[..., Tensor] | None = None
    facts: Callable[[], dict[str, object]] = field(default=dict)
    forget: Callable[[], None] = field(default=lambda: None)


def task_loss(base: nn.Module, hidden: Tensor, labels: Tensor, head: Tensor | None) -> Tensor:
    """What the model's class would compute: cross-entropy of next tokens, or of the first token's class."""
    if head is None:
        return base.loss_function(base.lm_head(hidden), labels, vocab_size=base.config.vocab_size)
    return F.cross_entropy(F.linear(hidden[:, 0].float(), head), labels)


def head_of(base: nn.Module) -> Tensor | None:
    """The frozen classifier of an encoder; None for a language model, which has a head."""
    return None if base.get_output_embeddings() is not None else classifier(base)


def joint_mask(batch: Batch, prompt_length: int, *, causal: bool, prompt_rows: bool) -> Tensor | None:
    """True where a query sees a key of [prompt ; text]; None where everything is visible.

    Args:
        prompt_rows: the prompt's rows are queries too.

    Returns:
        (B, 1, 1, P + N), or (B or 1, 1, queries, P + N) for a causal model.
    """
    real = batch.attention_mask.bool()
    seen = F.pad(real, (prompt_length, 0), value=True)[:, None, None, :] if batch.padded else None
    if not causal:
        return seen
    keys = prompt_length + real.shape[1]
    queries = keys if prompt_rows else real.shape[1]
    lower = real.new_ones(queries, keys).tril(keys - queries)[None, None]
    return lower if seen is None else lower & seen


def deep_form(base: nn.Module, prompts: Prompts, *, attention: str = "sdpa") -> Bound:
    """`h = layer(cat([prompt.expand(B, -1, -1), h], 1), mask)[:, P:]` for every layer."""
    model = twin(base, attention)
    backbone, head = model.base_model, head_of(base)
    prompt = prompts.deep.clone().requires_grad_()
    length, causal = prompt.shape[1], backbones.is_causal(backbone)

    def prepare(batch: Batch):
        mask = joint_mask(batch, length, causal=causal, prompt_rows=True)
        # With no padding transformers lets SDPA mask causally by itself, which eager attention cannot.
        if causal and not batch.padded and attention == "sdpa":
            mask = None
        if mask is not None and attention == "eager":
            lowest = torch.finfo(base.dtype).min
            mask = torch.zeros_like(mask, dtype=base.dtype).masked_fill(~mask, lowest)
        return batch.input_ids, mask, batch.labels

    def forward(input_ids, mask, labels):
        count = input_ids.shape[1]
        device = input_ids.device
        positions = torch.arange(count, device=device)[None] + backbones.first_position(backbone)
        hidden = backbones.embed(backbone, input_ids, positions, None)
        options = {}
        if backbones.uses_rotary(backbone):
            joint = torch.arange(length + count, device=device)[None]
            options["position_embeddings"] = backbone.rotary_emb(hidden, joint)
        for layer, own in zip(backbones.layers_of(backbone), prompt.to(hidden.dtype), strict=False):
            rows = torch.cat([own.expand(len(hidden), -1, -1), hidden], dim=1)
            rows = layer(rows, attention_mask=mask, **options)
            hidden = (rows[0] if isinstance(rows, tuple) else rows)[:, length:]
        return task_loss(model, backbones.final_norm(backbone, hidden), labels, head)

    return Bound(model, forward, prepare, [prompt], lambda arguments: prompt.grad)


def prefix_form(base: nn.Module, prompts: Prompts, *, attend: Callable | None = None, prepare_mask=None) -> Bound:
    """Keys and values concatenated inside attention; the text stands P positions later, as in PEFT.

    Args:
        attend: (q, k, v, mask, dropout_p, scale) -> out over the joined keys, SDPA when None.
        prepare_mask: (batch, P, causal) -> the mask given to `attend`, `joint_mask` when None.
    """
    _register()
    model = twin(base, _JOINED)
    head = head_of(base)
    prefix = prompts.prefix.clone().requires_grad_()
    length, causal = prefix.shape[3], backbones.is_causal(model.base_model)
    first = backbones.first_position(model.base_model) + length
    target = model.base_model

    def prepare(batch: Batch):
        if prepare_mask is not None:
            mask = prepare_mask(batch, length, causal)
        else:
            mask = joint_mask(batch, length, causal=causal, prompt_rows=False)
        positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None] + first
        return batch.input_ids, positions, mask, batch.labels

    def states(input_ids, positions, mask):
        options = {"use_cache": False} if causal else {}
        joined = (prefix.to(base.dtype), mask, attend or sdpa)
        output = target(input_ids=input_ids, position_ids=positions, benchmark_joined=joined, **options)
        return output.last_hidden_state

    def forward(input_ids, positions, mask, labels):
        return task_loss(model, states(input_ids, positions, mask), labels, head)

    def logits(input_ids, positions, mask, which):
        return model.lm_head(states(input_ids, positions, mask)[:, which])

    return Bound(model, forward, prepare, [prefix], lambda arguments: prefix.grad, logits=logits)


def plain_form(base: nn.Module, prompts: Prompts | None = None) -> Bound:
    """`base(inputs_embeds=embeddings.detach().requires_grad_(), attention_mask=...)`."""
    model = twin(base)
    head = head_of(base)
    causal = backbones.is_causal(model.base_model)

    def prepare(batch: Batch):
        embeddings = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        return embeddings, batch.attention_mask, batch.labels

    def forward(embeddings, mask, labels):
        if causal:
            return model(inputs_embeds=embeddings, attention_mask=mask, labels=labels, use_cache=False).loss
        states = model(inputs_embeds=embeddings, attention_mask=mask)
        return task_loss(model, states.last_hidden_state, labels, head)

    return Bound(model, forward, prepare, [], lambda arguments: arguments[0].grad)


FORM_BUILDERS = {"deep": deep_form, "prefix": prefix_form, "plain": plain_form}


def sdpa(q, k, v, mask, dropout_p, scale):
    """PyTorch's attention over the joined keys."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)


def _joined_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, benchmark_joined=None, **_):
    """transformers' attention with P trained keys and values in front of every row's own."""
    prefix, mask, attend = benchmark_joined
    rows = len(query)
    key, value = (
        torch.cat([own.expand(rows, -1, -1, -1), text], dim=2)
        for own, text in zip(prefix[module.layer_idx], (key, value), strict=False)
    )
    if attend is sdpa:
        # Where there is a mask transformers repeats key/value heads; SDPA's kernels for masks want that.
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (key, value))
    return attend(query, key, value, mask, dropout, scaling).transpose(1, 2), None


def _no_mask(*_, **__) -> None:
    """The mask was built before."""


def _register() -> None:
    AttentionInterface.register(_JOINED, _joined_attention)
    AttentionMaskInterface.register(_JOINED, _no_mask)
