"""The graph runner: packed, filled up, replayed from its buffers, and still the plain loop's losses."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_steps import CASES, SMALL, batches_for, batches_of, model_of, optimizer_of, plain_losses
from no_waiting import NoWaiting, attend_without_looking
from ptv2_fast import losses
from ptv2_fast.step.graph_runner import WARM_UP_STEPS, GraphRunner
from ptv2_fast.step.host_batch import pack, with_labels
from ptv2_fast.step.options import StepOptions
from ptv2_fast.step.packed import Buckets, PackedTask
from ptv2_fast.task_models import causal_lm
from tiny_models import tiny_model
from tolerances import assert_equal


@pytest.mark.parametrize("case", CASES)
def test_eager_steps_give_the_plain_losses(case):
    batches = batches_for(case)
    model = model_of(case)
    runner = GraphRunner(model, optimizer_of(model), buckets=SMALL)
    losses = torch.stack([runner.step(batch) for batch in batches])
    assert_equal(losses, plain_losses(case, batches), case)
    assert runner.captured == 0


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_give_the_plain_losses(case, counts):
    batches = batches_for(case, count=9)
    model = model_of(case)
    runner = GraphRunner(model, optimizer_of(model), buckets=Buckets(tokens=32, rows=4, targets=32))
    losses = torch.stack([runner.step(batch) for batch in batches])
    assert_equal(losses, plain_losses(case, batches), case)
    assert runner.captured >= 1 and counts.replays >= 3


def test_accumulated_batches_are_one_step(counts):
    batches = batches_of("CAUSAL_LM", count=12)
    model = model_of("llama text")
    runner = GraphRunner(model, optimizer_of(model), buckets=Buckets(tokens=32, rows=4, targets=32))
    losses = torch.stack([runner.step(*batches[i : i + 2]) for i in range(0, 12, 2)])
    assert_equal(losses, plain_losses("llama text", batches, accumulate=2), "losses")
    assert runner.captured >= 1


def test_evaluation_after_a_replay_sees_the_stepped_prompts(counts):
    batch = batches_of("SEQ_CLS", count=1)[0]
    model = model_of("bert rows, first token")
    optimizer = optimizer_of(model)
    runner = GraphRunner(model, optimizer, buckets=SMALL)
    for _ in range(WARM_UP_STEPS + 2):
        runner.step(batch)
    assert runner.captured == 1
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    # A replay changes parameters in place, behind the back of versions and of the optimizer's hook.
    bucket = next(iter(runner._known.values()))

    def replay():
        for parameter in model.adapters.parameters():
            parameter.data.add_(0.5)
        return torch.zeros(())

    bucket.replay = replay
    # Nor does the update's replay run any hook.
    runner._replay_update = lambda: None
    model.train()
    runner.step(batch)
    with torch.no_grad():
        after = model.eval()(**inputs).logits
        fresh = model_of("bert rows, first token").eval()
        fresh.load_state_dict(model.state_dict())
        assert_equal(after, fresh(**inputs).logits, "logits")
    assert not torch.allclose(before, after)


def test_more_sizes_than_graphs_run_eagerly(counts, caplog):
    batches = batches_of("TOKEN_CLS", count=3) * 5
    model = model_of("bert tags, base head")
    runner = GraphRunner(model, optimizer_of(model), buckets=Buckets(tokens=4, rows=1, targets=1), max_graphs=1)
    with caplog.at_level(logging.INFO, "ptv2_fast"):
        losses = torch.stack([runner.step(batch) for batch in batches])
    assert_equal(losses, plain_losses("bert tags, base head", batches), "losses")
    assert sum("more than 1 sizes" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("family", "injection", "task", "config", "extra", "reason"),
    [
        ("bert", "shallow", "TOKEN_CLS", {}, {}, "shallow prompt on a bidirectional model"),
        ("llama", "deep", "CAUSAL_LM", {}, {"position_ids": torch.arange(5).expand(2, -1)}, "batch has position_ids"),
    ],
)
def test_what_cannot_be_packed_runs_padded_and_says_why(family, injection, task, config, extra, reason, caplog):
    model = tiny_model(family, injection, task, **config).train()
    batch = {**batches_of(task, count=1)[0], **extra}
    torch.manual_seed(0)
    expected = model(**batch).loss.detach()
    runner = GraphRunner(model, optimizer_of(model))
    with caplog.at_level(logging.INFO, "ptv2_fast"):
        torch.manual_seed(0)
        assert_equal(runner.step(batch), expected, "loss")
        runner.step(batch)
    said = [r.getMessage() for r in caplog.records if "neither packed" in r.getMessage()]
    assert len(said) == 1 and reason in said[0]


def test_without_cuda_it_says_that_steps_are_eager(caplog):
    model = model_of("llama text")
    with caplog.at_level(logging.INFO, "ptv2_fast"):
        GraphRunner(model, optimizer_of(model))
    assert ["graph runner: steps run eagerly: the model is on the device type 'cpu', which has no CUDA graphs"] == [
        record.getMessage() for record in caplog.records if "graph runner" in record.getMessage()
    ]


def test_batches_without_labels_are_refused():
    model = model_of("llama text")
    runner = GraphRunner(model, optimizer_of(model))
    for batches in ([], [{"input_ids": torch.ones(1, 2, dtype=torch.long)}]):
        with pytest.raises(ValueError, match="batches must be one or more, each with labels"):
            runner.step(*batches)


@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_bucket_sizes_are_positive_integers(value):
    with pytest.raises(ValueError, match="rows must be a positive integer"):
        Buckets(rows=value)


def test_few_sizes_serve_many_batches():
    buckets = Buckets()
    ids = torch.ones(1, 5000, dtype=torch.long)
    sizes = set()
    for tokens in range(1, 5000, 7):
        batch = {"input_ids": ids[:, :tokens], "labels": ids[:, :tokens]}
        sizes.add(buckets.fill(pack(batch, PackedTask("TOKEN_CLS"))).input_ids.shape[1])
    assert len(sizes) <= 40 and min(sizes) == 64


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any),
    tokens=st.integers(1, 70),
    rows=st.integers(1, 5),
    targets=st.integers(1, 9),
)
def test_filled_batches_hold_the_same_text(lengths, tokens, rows, targets):
    width = max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(1, 1 + mask.numel()).view_as(mask)
    labels = torch.where(mask == 1, ids, -100)
    packed = pack({"input_ids": ids, "attention_mask": mask, "labels": labels}, PackedTask("TOKEN_CLS"))
    filled = Buckets(tokens, rows, targets).fill(packed)
    count, total = sum(lengths), filled.input_ids.shape[1]
    bounds = filled.cu_seqlens.tolist()
    assert bounds[: len(lengths) + 1] == packed.bounds.tolist()
    assert bounds[-1] == total and total % tokens == 0 and total - count < max(tokens, count / 8)
    steps = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    assert min(steps) >= 0 and max(steps) <= filled.longest
    assert torch.equal(filled.input_ids[0, :count], ids[mask == 1])
    kept = filled.targets != -100
    assert torch.equal(filled.targets[kept], ids[mask == 1])
    assert torch.equal(filled.tokens[kept], torch.arange(count))
    assert bool((filled.tokens[~kept] == total).all())


@pytest.mark.parametrize("case", CASES)
def test_a_packed_step_never_waits_for_the_device(case, monkeypatch):
    attend_without_looking(monkeypatch)
    # Labels on the CPU are looked at.
    for module in (losses, causal_lm):
        monkeypatch.setattr(module, "check_labels", lambda *_: None)
    monkeypatch.setattr(losses, "check_numbers", lambda *_, **__: None)
    model = model_of(case)
    model.step_options = StepOptions(fused_projections=True)
    task = model.packed_task()
    packed = SMALL.fill(pack(with_labels(batches_for(case, count=1)[0], task), task))
    model.packed_loss(packed)  # whatever is made once
    with NoWaiting():
        loss = model.packed_loss(packed)
        loss.backward()
    assert loss.isfinite()


def test_a_padded_step_does_wait():
    model = model_of("llama text")
    model.step_options = StepOptions(unpad=True)
    with pytest.raises(AssertionError, match="aten"), NoWaiting():
        model(**batches_of("CAUSAL_LM", count=1)[0])


def test_texts_up_to_the_models_limit_fit():
    model = tiny_model("gpt2", "shallow", "CAUSAL_LM").train()
    ids = torch.randint(3, 30, (1, 64 - 5))
    loss = GraphRunner(model, optimizer_of(model)).step({"input_ids": ids, "labels": ids})
    assert loss.isfinite()


@pytest.mark.parametrize("labels", [torch.rand(2), torch.zeros(2, 5, dtype=torch.long)])
def test_labels_of_another_kind_are_refused(labels):
    model = model_of("bert rows, first token")
    with pytest.raises(ValueError, match="labels must be integers"):
        ids = torch.ones(2, 5, dtype=torch.long)
        GraphRunner(model, optimizer_of(model)).step({"input_ids": ids, "labels": labels})


def test_a_step_with_disabled_adapters_is_refused(counts):
    batch = batches_of("SEQ_CLS", count=1)[0]
    model = model_of("bert rows, first token")
    runner = GraphRunner(model, optimizer_of(model))
    for _ in range(WARM_UP_STEPS + 2):
        runner.step(batch)
    # What is captured would be replayed with the prompts.
    assert runner.captured == 1
    with model.disable_adapter(), pytest.raises(RuntimeError, match="outside disable_adapter"):
        runner.step(batch)
    assert runner.step(batch).isfinite()


def test_float16_is_refused():
    model = model_of("llama text")
    with pytest.raises(ValueError, match="autocast must be"):
        GraphRunner(model, optimizer_of(model), autocast=torch.float16)


def test_the_switch_keeps_the_runner_eager(monkeypatch):
    model = model_of("llama text")
    runner = GraphRunner(model, optimizer_of(model))
    monkeypatch.setattr(runner, "_device", torch.device("cuda"))
    model.step_options = StepOptions(cuda_graphs=False)
    assert "cuda_graphs is off" in runner._why_not_captured(model.step_plan())
    model.step_options = StepOptions(cuda_graphs=True)
    assert runner._why_not_captured(model.step_plan()) is None
    model.gradient_checkpointing_enable()
    assert "gradient checkpointing" in runner._why_not_captured(model.step_plan())
