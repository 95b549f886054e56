"""What a step of an encoder-decoder computes: no tensor of P + N rows, and none of the savings of other models."""

from __future__ import annotations

import logging

import pytest
import torch

from batches import padded, text_rows
from ptv2_fast import GraphRunner, StepOptions
from shape_audit import ShapeAudit
from tiny_seq2seq import KINDS, STACKS, Pair, literal, pair, tiny_base, tiny_model
from tolerances import assert_equal

ROWS, TOKENS, TARGETS, LENGTH = 3, 13, 7, 10
FORBIDDEN = (TOKENS + LENGTH, TARGETS + LENGTH, ROWS * (TOKENS + LENGTH), ROWS * (TARGETS + LENGTH))


def _model(kind, injection, **config):
    stacks = {} if injection == "shallow" else {"stacks": STACKS}
    return tiny_model(kind, injection, **stacks, **config)


def _audited():
    return Pair(padded(text_rows(9, 4, 13), "left", TOKENS), padded(text_rows(7, 3, 5, seed=5), "right", TARGETS))


def _inside_attention(shape):
    """Keys and values (B, H, P + M, d), and masks or biases (1 or B, 1 or H, 1 or N, P + M) of PyTorch's kernel."""
    return len(shape) == 4 and shape[1] in (1, 4) and (shape[3] in (6, 8) or shape[2] in (1, TOKENS, TARGETS))


@pytest.mark.parametrize("injection", ["deep", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_p_plus_n_rows(kind, injection):
    model, batch = _model(kind, injection, length=LENGTH).train(), _audited()
    audit = ShapeAudit(*FORBIDDEN, allowed=_inside_attention)
    with audit:
        model(**batch.inputs, labels=batch.labels, output_hidden_states=True).loss.backward()
    assert audit.hits == [] and audit.calls["cat"] > 0
    generating = ShapeAudit(*FORBIDDEN, allowed=_inside_attention)
    with generating:
        model.eval().generate(**batch.source.inputs, max_new_tokens=2, do_sample=False)
    assert generating.hits == []
    literally = ShapeAudit(*FORBIDDEN, allowed=_inside_attention)
    base = tiny_base(kind)
    with literally:
        literal(model, getattr(base, "model", base), *batch.inputs.values())[0].sum().backward()
    assert literally.hits, "the audit could not fail"


@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_shallow_rows_are_joined_once(kind):
    """They are real rows of the encoder, whatever the number of its layers."""
    joined = []
    for layers in (2, 4):
        changes = {"num_layers" if kind == "t5" else "encoder_layers": layers}
        model, batch = _model(kind, "shallow", length=LENGTH, base_changes=changes).train(), _audited()
        audit = ShapeAudit(*FORBIDDEN)
        with audit:
            model(**batch.inputs, labels=batch.labels).loss.backward()
        assert audit.hits
        joined.append({name: audit.calls[name] for name in ("cat", "slice", "slice_backward", "index")})
    assert joined[0] == joined[1]


def test_savings_of_a_step_are_off_and_say_why(caplog):
    options = StepOptions(unpad=True, fused_projections=True, compile_layers=True, last_rows=True)
    for kind in ("t5", "bart", "mbart"):
        model, batch = _model(kind, "deep"), pair()
        model.step_options = options
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="ptv2_fast"):
            expected = model(**batch.inputs, use_cache=False).logits
            logits = model.train()(**batch.inputs).logits
        assert_equal(logits, expected)
        assert "unpad off (an encoder-decoder runs its padded rows as they are)" in caplog.text
        assert " on (" not in caplog.text


@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_graph_runner_runs_padded_steps(kind):
    model, batch = _model(kind, "deep").train(), {**pair().source.inputs, "labels": pair().labels}
    with torch.no_grad():
        expected = model(**batch).loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    runner = GraphRunner(model, optimizer)
    assert_equal(runner.step(batch), expected)
    assert runner.step(batch) < expected


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_backend_that_was_asked_for_serves(kind):
    model = _model(kind, "deep", backend="reference")
    assert_equal(model(**pair().inputs).logits, _model(kind, "deep")(**pair().inputs).logits)
