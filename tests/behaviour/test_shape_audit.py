"""No tensor of P + N rows exists, forward or backward, in any family and injection."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from batches import padded, text_rows
from ptv2_fast.families.registry import family_of
from shape_audit import ShapeAudit
from tiny_models import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    HIDDEN,
    INJECTIONS,
    LABELS,
    literal_states,
    tiny_base,
    tiny_model,
)

# Prime, and no other size of the tiny models nor a product of them: a hit is P + N and nothing else.
ROWS, TOKENS, LENGTH = 3, 13, 10
TOTAL = LENGTH + TOKENS
FORBIDDEN = (TOTAL, ROWS * TOTAL)

EVERY = [pytest.param(family, injection, id=f"{family}-{injection}") for family in FAMILIES for injection in INJECTIONS]
INSIDE = [p for p in EVERY if not (p.values[0] in ENCODERS and p.values[1] == "shallow")]


def _in_attention(backbone):
    """Keys and values (B, heads, P + N, d) and their mask (B or 1, H or 1, N or 1, P + N)."""
    config = backbone.config
    if getattr(config, "attn_logit_softcapping", None) is not None or config.model_type == "deberta-v2":
        return _scores
    heads = {config.num_attention_heads, getattr(config, "num_key_value_heads", 4)}
    head_dim = getattr(config, "head_dim", None) or 8

    def allowed(shape):
        if len(shape) != 4:
            return False
        keys = shape[1] in heads and shape[2:] == (TOTAL, head_dim)
        mask = shape[1] in {1, *heads} and shape[2] in (1, TOKENS) and shape[3] == TOTAL
        return keys or mask

    return allowed


def _scores(shape):
    """Whatever is no hidden state: where PyTorch has no kernel, it writes scores out.

    It has none for a trained gate, for a softcap, nor for scores of distances that depend on queries and keys.
    """
    return HIDDEN not in shape and len(shape) > 2


def _few_experts(family):
    """As many experts as a token gets: otherwise how many tokens one of them has may be any number."""
    return {"mixtral": {"num_local_experts": 2}, "qwen3_moe": {"num_experts": 2}}.get(family, {})


def _batch():
    return padded(text_rows(9, 4, 13), "left", width=TOKENS)


def _step(model, task, audit):
    """One training step under an audit."""
    batch = _batch()
    labels = batch.input_ids if task == "CAUSAL_LM" else batch.input_ids % LABELS
    model.train()
    with audit:
        model(**batch.inputs, labels=labels, output_hidden_states=True).loss.backward()
    for name, parameter in model.adapters.named_parameters():
        assert parameter.grad is not None, name
    assert audit.calls["embedding"] >= 1 and audit.calls["mm"] + audit.calls["addmm"] > 10


def _task_of(family):
    return "CAUSAL_LM" if family in DECODERS else "TOKEN_CLS"


@pytest.mark.parametrize(("family", "injection"), INSIDE)
def test_the_torch_backend_joins_keys_and_values_alone(family, injection):
    task = _task_of(family)
    model = tiny_model(family, injection, task, length=LENGTH, base_changes=_few_experts(family))
    audit = ShapeAudit(*FORBIDDEN, allowed=_in_attention(model.backbone))
    _step(model, task, audit)
    assert audit.hits == []


@pytest.mark.parametrize(
    ("family", "injection"),
    [("bert", "deep"), ("gpt2", "shallow"), ("llama", "deep"), ("qwen3", "prefix")],
)
def test_the_triton_backend_joins_nothing(family, injection):
    task = _task_of(family)
    # Kernels serve head sizes from 16 on.
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 1}
    if family in ("llama", "qwen3"):
        sizes |= {"num_key_value_heads": 1, "head_dim": 16}
    options = {"base_changes": sizes, "backend": "triton"}
    model = tiny_model(family, injection, task, length=LENGTH, **options)
    audit = ShapeAudit(*FORBIDDEN)
    _step(model, task, audit)
    assert audit.hits == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_hidden_states_of_p_plus_n_rows_with_every_option_on(family):
    """Gate, MLP, prompt dropout, chosen layers. A trained gate makes PyTorch write scores out."""
    task = _task_of(family)
    options = {"prompt_init": "gated", "reparameterization": 6, "prompt_dropout": 0.1}
    model = tiny_model(family, "prefix", task, length=LENGTH, layers=(1,), base_changes=_few_experts(family), **options)
    audit = ShapeAudit(*FORBIDDEN, allowed=_scores)
    _step(model, task, audit)
    assert audit.hits == []


@pytest.mark.parametrize("family", ENCODERS)
def test_shallow_rows_of_an_encoder_are_joined_once(family):
    """Virtual tokens that see the text are real rows; no layer joins, cuts or masks them again."""
    counts = []
    for layers in (2, 4):
        changes = {"num_hidden_layers": layers}
        model = tiny_model(family, "shallow", "TOKEN_CLS", length=LENGTH, base_changes=changes)
        audit = ShapeAudit(*FORBIDDEN)
        batch = _batch()
        with audit:
            labels = batch.input_ids % LABELS
            model.train()(**batch.inputs, labels=labels).loss.backward()
        assert audit.hits, "there are no virtual rows at all"
        names = {"cat", "slice", "slice_backward", "constant_pad_nd", "copy"}
        # Rotary and fused layers cut and join the channels of a head as well: those are no hidden states.
        rows = [hit.split(".")[1] for hit, shape in audit.hits if shape[-1] == HIDDEN]
        counts.append(Counter(name for name in rows if name in names))
        if not family_of(model.backbone).rotary:
            counts[-1] = {name: audit.calls[name] for name in names}
        assert counts[-1]["cat"] >= 1
    assert counts[0] == counts[1]


@pytest.mark.parametrize("family", DECODERS)
def test_generation_steps_join_keys_and_values_alone(family):
    model = tiny_model(family, "deep", "CAUSAL_LM", length=LENGTH, base_changes=_few_experts(family))
    audit = ShapeAudit(*FORBIDDEN, allowed=_in_attention(model.backbone))
    with audit:
        model.generate(**_batch().inputs, max_new_tokens=2, do_sample=False)
    assert audit.hits == []


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_the_literal_form_trips_the_audit(family, injection):
    """The audit can fail: concat, mask, layer, slice leaves its marks in every injection."""
    model = tiny_model(family, injection, length=LENGTH)
    base = tiny_base(family)
    allowed = _in_attention(base)
    audit = ShapeAudit(*FORBIDDEN) if allowed is _scores else ShapeAudit(*FORBIDDEN, allowed=allowed)
    batch = _batch()
    with audit:
        states = literal_states(model, base, **batch.inputs)
        states.sum().backward()
    hits = {name.split(".")[1] for name, _ in audit.hits}
    if injection == "prefix":
        # It has no rows of hidden states; its scores over P + N keys, (B * H, N, P + N), give it away.
        assert "bmm" in hits
    else:
        assert {"cat", "native_layer_norm"} & hits and len(audit.hits) > 20


def test_a_single_joined_tensor_is_noticed():
    audit = ShapeAudit(*FORBIDDEN, allowed=_in_attention(tiny_base("bert")))
    with audit:
        torch.cat([torch.zeros(ROWS, LENGTH, 32), torch.zeros(ROWS, TOKENS, 32)], dim=1)
        torch.zeros(ROWS, 4, TOTAL, 8)
    assert [shape for _, shape in audit.hits] == [(ROWS, TOTAL, 32)]
