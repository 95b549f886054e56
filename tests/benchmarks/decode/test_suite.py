"""Generation behind a prompt: every provider generates the same, and who does not is found out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import record
from benchmarks.decode import suite as decode_suite
from benchmarks.decode.cases import decode_cases, tiny_decode_cases
from benchmarks.decode.precompile import compile_decode
from benchmarks.decode.providers import DecodeKit, _build_ours, decode_providers, two_call_attention
from benchmarks.report import table
from benchmarks.step import report as step_report
from benchmarks.step.batches import Prompts, make_prompts
from benchmarks.step.goals import STEP_GOALS
from benchmarks.step.models import build_base

CPU = torch.device("cpu")
CASE = tiny_decode_cases()[0]


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile gives back what it is given."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_every_provider_is_judged_and_timed(make_context, uncompiled):
    context = make_context(every_peer=True)
    assert decode_suite.run(context) == "complete"
    record.check_schema(context.result.data)
    (cell,) = context.result.cells
    assert {name: entry["status"] for name, entry in cell["peers"].items()} == dict.fromkeys(
        (p.name for p in decode_providers()), "timed"
    )
    for entry in cell["peers"].values():
        assert entry["errors"]["regret"] < 1e-3
        assert entry["tokens_per_second"] == pytest.approx(1e3 * CASE.B / entry["ms"])
    assert "ours_compiled" in step_report.decode_table([cell], table)


def test_what_is_compiled_is_written_into_a_cell_that_stands(make_context, uncompiled, monkeypatch):
    context = make_context()
    written = []
    put = context.result.put
    monkeypatch.setattr(context.result, "put", lambda cell: (written.append(set(cell["peers"])), put(cell)))
    assert decode_suite.run(context) == "complete"
    eager = {"ours", "ours_captured", "peft"}
    assert written == [eager, {*eager, "ours_compiled"}, {*eager, "ours_compiled", "static_compiled"}]
    peers = context.result.cells[0]["peers"]
    # Ratios are taken within the rounds in which both took turns.
    assert "ours" in peers["static_compiled"]["beside"] and "beside" not in peers["peft"]


def test_a_peer_that_cannot_fit_says_how_much_it_would_need(make_context, monkeypatch):
    context = make_context()
    monkeypatch.setattr(type(context), "memory", property(lambda self: 1000))
    assert decode_suite.run(context) == "complete"
    peers = context.result.cells[0]["peers"]
    assert peers["peft"]["status"] == "not applicable" and "the device has" in peers["peft"]["reason"]


def test_a_provider_without_the_prompt_is_wrong(make_context):
    wrong = Prompts(torch.zeros(0), torch.zeros(0))

    def build(kit):
        off = replace(kit, prompts=replace(wrong, prefix=0.5 * kit.prompts.prefix))
        return _build_ours(off)

    ours = next(p for p in decode_providers() if p.name == "ours")
    context = make_context()
    assert decode_suite.run(context, [replace(ours, build=build)]) == "red"
    assert "standard deviations below the best logit" in context.result.cells[0]["peers"]["ours"]["reason"]


def test_a_peer_that_fails_is_a_row(make_context):
    def build(kit):
        raise RuntimeError("no such cache")

    peft = next(p for p in decode_providers() if p.name == "peft")
    context = make_context()
    assert decode_suite.run(context, [replace(peft, build=build)]) == "complete"
    assert context.result.cells[0]["peers"]["peft"]["reason"] == "RuntimeError: no such cache"


def test_two_calls_merge_to_one_softmax():
    torch.manual_seed(0)
    B, H, kv, n, M, P, d = 3, 4, 2, 2, 7, 5, 8
    q, k, v = torch.randn(B, H, n, d), torch.randn(B, kv, M, d), torch.randn(B, kv, M, d)
    prefix = torch.randn(1, 2, kv, P, d)
    slots = torch.tensor([[3, 4]])
    module = type("Layer", (), {"layer_idx": 0})()
    out, _ = two_call_attention(module, q, k, v, None, scaling=0.3, benchmark_prefix=prefix, benchmark_slots=slots)
    keys, values = (torch.cat([prefix[0, i].expand(B, -1, -1, -1), x], 2) for i, x in enumerate((k, v)))
    keys, values = (x.repeat_interleave(2, 1) for x in (keys, values))
    seen = torch.arange(P + M) < P + slots[0, :, None] + 1
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=0.3)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_work_reads_the_prompt_once():
    base = build_base(CASE.model, CPU, torch.float32)
    one, many = (decode_suite.decode_work(replace(CASE, B=B), base) for B in (1, 2))
    keys = 2 * 1 * 16 * 2 * 4
    assert many.bytes - one.bytes == keys * (CASE.N + CASE.new / 2)
    longer = decode_suite.decode_work(replace(CASE, P=CASE.P + 10), base)
    assert longer.bytes - decode_suite.decode_work(CASE, base).bytes == keys * 10


def test_the_first_cells_judge_every_decode_goal():
    first = [case.as_dict() for case in decode_cases()[:3]]
    for goal in STEP_GOALS:
        if goal.suite == "decode":
            assert any(goal.judged(case) for case in first), goal.id
    assert len(decode_cases()) == 24


def test_a_generation_that_compiles_at_every_call_is_given_up(make_context, monkeypatch):
    monkeypatch.setattr(decode_suite, "_TOO_LONG", -1.0)
    base = build_base(CASE.model, CPU, torch.float32)
    kit = DecodeKit(base, make_prompts(base, CASE.P), CASE)
    slow = replace(decode_providers()[0], build=lambda kit: lambda ids, count: ids)
    entry = decode_suite._set_up(slow, kit, torch.zeros(1, 1), make_context(), {})
    assert entry["status"] == "failed" and "took" in entry["reason"]


def test_a_generation_with_a_few_layers_runs():
    compile_decode(CASE, tiny=True)
