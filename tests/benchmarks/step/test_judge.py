"""What may be timed: the forms follow the reference, and a provider that is off is found out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.step.batches import make_batch, make_prompts
from benchmarks.step.cases import StepCase
from benchmarks.step.forms import deep_form, joint_mask, plain_form, prefix_form
from benchmarks.step.models import build_base, float_twin, twin
from benchmarks.step.providers import Kit, _build_flex, step_providers
from benchmarks.step.verify import (
    StepJudge,
    clear_gradients,
    evaluate,
    forms_follow_the_reference,
    in_chunks,
    run_once,
)

CPU = torch.device("cpu")


@pytest.fixture
def bert():
    return build_base("tiny-bert", CPU, torch.float32)


def _batch(base, lengths=(9, 4, 7)):
    return make_batch(base, lengths, causal=base.get_output_embeddings() is not None)


def test_the_judge_computes_what_the_package_calls_literal():
    errors = forms_follow_the_reference(CPU)
    assert len(errors) == 4 and all(error < 1e-6 for error in errors.values()), errors


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-roberta", "tiny-llama", "tiny-qwen3"])
@pytest.mark.parametrize("lengths", [(9, 4, 7), (6, 6)], ids=["padded", "whole"])
def test_every_eager_provider_computes_its_form(model, lengths):
    case = StepCase(model, len(lengths), max(lengths), 4, dtype="fp32")
    base = build_base(model, CPU, torch.float32)
    kit = Kit(base, make_prompts(base, 4), case, tiny=True)
    batch, judge = _batch(base, lengths), StepJudge(base, kit.prompts)
    seen = []
    for provider in step_providers():
        if provider.compiles or "eager" not in provider.peers or provider.refuses(case, CPU):
            continue
        bound = provider.build(kit)
        entry = judge.expected(provider.form, batch).entry(*evaluate(bound, batch))
        assert entry["status"] == "passed", (provider.name, entry)
        seen.append(provider.name)
    wanted = {"ours", "ours_0_plain", "ours_p0", "literal_sdpa", "literal_eager", "peft", "joined_sdpa", "floor"}
    assert wanted <= set(seen)


def _without_padding_mask(base, prompts):
    right = prefix_form(base, prompts)
    return replace(right, prepare=lambda batch: (*right.prepare(batch)[:2], None, batch.labels))


def _at_other_positions(base, prompts):
    right = prefix_form(base, prompts)

    def prepare(batch):
        ids, positions, mask, labels = right.prepare(batch)
        return ids, positions - 1, mask, labels

    return replace(right, prepare=prepare)


def _with_other_prompts(base, prompts):
    return prefix_form(base, replace(prompts, prefix=1.01 * prompts.prefix))


@pytest.mark.parametrize("spoil", [_without_padding_mask, _at_other_positions, _with_other_prompts])
def test_a_provider_that_is_off_is_wrong(bert, spoil):
    prompts, batch = make_prompts(bert, 4), _batch(bert)
    entry = StepJudge(bert, prompts).expected("prefix", batch).entry(*evaluate(spoil(bert, prompts), batch))
    assert entry["status"] == "wrong" and "gradient: relative error" in entry["reason"]


def test_a_loss_that_is_not_finite_is_wrong_and_writes_as_json(bert):
    expected = StepJudge(bert, make_prompts(bert, 4)).expected("plain", _batch(bert))
    entry = expected.entry(float("nan"), expected.gradient)
    assert entry["status"] == "wrong" and entry["errors"]["loss"] is None


def test_the_judge_goes_through_a_batch_in_parts(monkeypatch):
    base = build_base("tiny-qwen3", CPU, torch.float32)
    prompts, batch = make_prompts(base, 4), _batch(base)
    for form in (deep_form, plain_form):
        whole = evaluate(form(base, prompts), batch)
        monkeypatch.setattr("benchmarks.step.verify._CHUNK_TOKENS", {"cpu": 13})
        parts = in_chunks(form(base, prompts), batch, 4)
        assert parts[0] == pytest.approx(whole[0], rel=1e-5)
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-4, atol=1e-7)


def test_half_precision_is_judged_by_single_precision():
    base = build_base("tiny-bert", CPU, torch.bfloat16)
    prompts, batch = make_prompts(base, 4), _batch(base)
    expected = StepJudge(base, prompts).expected("deep", batch)
    assert 3e-2 <= expected.allowed < 0.2
    assert expected.entry(*evaluate(deep_form(base, prompts, attention="eager"), batch))["status"] == "passed"
    assert float_twin(base).dtype == torch.float32 and base.dtype == torch.bfloat16


def test_flex_attention_computes_the_same_loss(bert):
    # On the CPU it runs forward only.
    for base in (bert, build_base("tiny-qwen3", CPU, torch.float32)):
        prompts, batch = make_prompts(base, 4), _batch(base)
        kit = Kit(base, prompts, StepCase("tiny-bert", 3, 9, 4, dtype="fp32"))
        flex, sdpa = _build_flex(kit), prefix_form(base, prompts)
        with torch.no_grad():
            losses = [float(bound.forward(*bound.prepare(batch))) for bound in (flex, sdpa)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_twins_share_weights_and_nothing_else(bert):
    other = twin(bert, "eager")
    assert all(a is b for a, b in zip(bert.parameters(), other.parameters(), strict=True))
    assert other.config is not bert.config and bert.config._attn_implementation == "sdpa"
    assert other.encoder.layer[0] is not bert.encoder.layer[0]


def test_a_mask_is_built_only_where_something_is_hidden(bert):
    whole, padded = _batch(bert, (5, 5)), _batch(bert, (5, 3))
    assert joint_mask(whole, 2, causal=False, prompt_rows=False) is None
    assert joint_mask(padded, 2, causal=False, prompt_rows=False)[1, 0, 0].tolist() == [True] * 5 + [False] * 2
    lower = joint_mask(whole, 2, causal=True, prompt_rows=False)
    assert lower[0, 0, 0].tolist() == [True] * 3 + [False] * 4


def test_what_a_captured_step_leaves_behind_is_nobody_elses(bert):
    case = StepCase("tiny-bert", 3, 9, 4, dtype="fp32")
    kit, batch = Kit(bert, make_prompts(bert, 4), case, tiny=True), _batch(bert)
    graph, ours = (next(p for p in step_providers() if p.name == name).build(kit) for name in ("ours_graph", "ours"))
    judge = StepJudge(bert, kit.prompts)
    for bound in (graph, ours, graph, ours):
        assert judge.expected("deep", batch).entry(*evaluate(bound, batch))["status"] == "passed"
    graph.learn(1.0)
    before = kit.prompts_of().detach().clone()
    graph.take(*graph.prepare(batch))
    assert not torch.equal(before, kit.prompts_of())


def test_who_is_judged_after_others_were_timed_starts_where_they_did(bert):
    kit, batch = Kit(bert, make_prompts(bert, 4), StepCase("tiny-bert", 3, 9, 4, dtype="fp32"), tiny=True), _batch(bert)
    graph, ours = (next(p for p in step_providers() if p.name == name).build(kit) for name in ("ours_graph", "ours"))
    expected = StepJudge(bert, kit.prompts).expected("deep", batch)
    graph.learn(1.0)
    graph.take(*graph.prepare(batch))
    assert expected.entry(*evaluate(ours, batch))["status"] == "wrong"
    kit.restart()
    assert expected.entry(*evaluate(ours, batch))["status"] == "passed"


def test_the_copy_in_float32_is_gone_before_the_model_itself_is_judged(monkeypatch):
    base = build_base("tiny-bert", CPU, torch.bfloat16)
    batch, judge = _batch(base), StepJudge(base, make_prompts(base, 4))
    exact = judge.exactly("deep", batch)
    judge.close()
    monkeypatch.setattr("benchmarks.step.verify.float_twin", lambda base: pytest.fail("a second copy"))
    expected = judge.expected("deep", batch)
    assert expected.loss == exact[0] and expected.gradient is exact[1] and expected.allowed >= 3e-2


def test_no_gradient_is_left_behind(bert):
    prompts, batch = make_prompts(bert, 4), _batch(bert)
    bound = plain_form(bert)
    arguments = bound.prepare(batch)
    run_once(bound, arguments)
    assert arguments[0].grad is None
    deep = deep_form(bert, prompts)
    deep.forward(*deep.prepare(batch)).backward()
    clear_gradients(deep, ())
    assert deep.trained[0].grad is None
