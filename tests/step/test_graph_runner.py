"""The graph runner: packed, filled up, replayed from its buffers, and still the plain loop's losses."""

from __future__ import annotations

import copy
import logging
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from tolerances import assert_equal
from torch.utils._python_dispatch import TorchDispatchMode

from ptv2_fast import HeadConfig, heads, tasks
from ptv2_fast.attention import hook
from ptv2_fast.step import graph_runner
from ptv2_fast.step.graph_runner import WARM_UP_STEPS, GraphRunner
from ptv2_fast.step.options import StepOptions
from ptv2_fast.step.packed import Buckets, pack

OFF = StepOptions(**{field.name: False for field in fields(StepOptions)})
SMALL = Buckets(tokens=8, rows=2, targets=4)
OWN = {"own": 3}
LAST = HeadConfig("SEQ_CLS", 3, pooling="last")
CASES = {
    "bert tags, base head": ("bert", "deep", "TOKEN_CLS", {}),
    "roberta tags, own head": ("roberta", "prefix", "TOKEN_CLS", {"heads": OWN}),
    "bert rows, first token": ("bert", "deep", "SEQ_CLS", {"heads": OWN}),
    "llama rows, last token": ("llama", "deep", "SEQ_CLS", {"heads": {"own": LAST}}),
    "llama text": ("llama", "deep", "CAUSAL_LM", {}),
    "gpt2 text": ("gpt2", "shallow", "CAUSAL_LM", {}),
    "deberta tags": ("deberta-v2", "deep", "TOKEN_CLS", {}),
    "mpnet rows, first token": ("mpnet", "prefix", "SEQ_CLS", {"heads": OWN}),
    "qwen3 text": ("qwen3", "prefix", "CAUSAL_LM", {}),
}


class FakeCapture:
    """A capture that keeps the call: a replay runs it again on whatever the buffers hold then."""

    def __init__(self, device):
        pass

    def warm_up(self, call):
        return call()

    def __call__(self, call):
        return call


@pytest.fixture
def pretend_cuda(monkeypatch):
    monkeypatch.setattr(GraphRunner, "_why_not_captured", lambda self: None)
    monkeypatch.setattr(graph_runner, "_CudaCapture", FakeCapture)
    # AdamW refuses to be capturable on a CPU.
    monkeypatch.setattr(GraphRunner, "_hold_rates", lambda self: None)


def _model(case):
    family, injection, task, config = CASES[case]
    changes = {} if task == "CAUSAL_LM" or config else {"classifier_dropout": 0.0}
    torch.manual_seed(5)
    return tiny_model(family, injection, task, base_changes=changes, **config).train()


def _batches(task, count=6, seed=0):
    """Batches of different sizes, padded on either side."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 5), (3, 7), (2, 4)]
    batches = []
    for step in range(count):
        rows, tokens = sizes[step % len(sizes)]
        lengths = torch.randint(2, tokens + 1, (rows,), generator=generator)
        mask = (torch.arange(tokens) < lengths[:, None]).long()
        mask = mask if step % 2 else mask.flip(1)
        ids = torch.randint(3, 30, (rows, tokens), generator=generator).masked_fill(mask == 0, 1)
        if task == "SEQ_CLS":
            labels = torch.randint(0, 3, (rows,), generator=generator)
        else:
            labels = torch.randint(0, 3, (rows, tokens), generator=generator)
            inside = mask if task == "TOKEN_CLS" else (mask.cumsum(-1) > 1) & (mask == 1)
            labels = labels.masked_fill(inside == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def _optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def _plain_losses(case, batches, accumulate=1):
    model = _model(case)
    model.step_options = OFF
    optimizer = _optimizer(model)
    losses = []
    for start in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        group = batches[start : start + accumulate]
        total = 0
        for batch in group:
            loss = model(**batch).loss / len(group)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)
    return torch.stack(losses)


@pytest.mark.parametrize("case", CASES)
def test_eager_steps_give_the_plain_losses(case):
    batches = _batches(CASES[case][2])
    model = _model(case)
    runner = GraphRunner(model, _optimizer(model), buckets=SMALL)
    losses = torch.stack([runner.step(batch) for batch in batches])
    assert_equal(losses, _plain_losses(case, batches), case)
    assert runner.captured == 0


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_give_the_plain_losses(case, pretend_cuda):
    batches = _batches(CASES[case][2], count=15)
    model = _model(case)
    runner = GraphRunner(model, _optimizer(model), buckets=Buckets(tokens=32, rows=4, targets=32))
    losses = torch.stack([runner.step(batch) for batch in batches])
    assert_equal(losses, _plain_losses(case, batches), case)
    assert runner.captured >= 1


def test_accumulated_batches_are_one_step(pretend_cuda):
    batches = _batches("CAUSAL_LM", count=12)
    model = _model("llama text")
    runner = GraphRunner(model, _optimizer(model), buckets=Buckets(tokens=32, rows=4, targets=32))
    losses = torch.stack([runner.step(*batches[i : i + 2]) for i in range(0, 12, 2)])
    assert_equal(losses, _plain_losses("llama text", batches, accumulate=2), "losses")
    assert runner.captured >= 1


def test_evaluation_after_a_replay_sees_the_stepped_prompts(pretend_cuda):
    batch = _batches("SEQ_CLS", count=1)[0]
    model = _model("bert rows, first token")
    optimizer = _optimizer(model)
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
        model.train()
        runner.step(batch)
        after = model.eval()(**inputs).logits
        fresh = _model("bert rows, first token").eval()
        fresh.load_state_dict(model.state_dict())
        assert_equal(after, fresh(**inputs).logits, "logits")
    assert not torch.allclose(before, after)


def test_more_sizes_than_graphs_run_eagerly(pretend_cuda, caplog):
    batches = _batches("TOKEN_CLS", count=3) * 5
    model = _model("bert tags, base head")
    runner = GraphRunner(model, _optimizer(model), buckets=Buckets(tokens=4, rows=1, targets=1), max_graphs=1)
    with caplog.at_level(logging.INFO, "ptv2_fast"):
        losses = torch.stack([runner.step(batch) for batch in batches])
    assert_equal(losses, _plain_losses("bert tags, base head", batches), "losses")
    assert sum("more than 1 sizes" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("family", "injection", "task", "config", "extra", "reason"),
    [
        ("bert", "shallow", "TOKEN_CLS", {}, {}, "shallow prompt on a bidirectional model"),
        ("bert", "deep", "SEQ_CLS", {}, {}, "base's own classifier"),
        ("bert", "deep", "SEQ_CLS", {"heads": {"m": HeadConfig("SEQ_CLS", 3, pooling="mean")}}, {}, "mean"),
        ("llama", "deep", "CAUSAL_LM", {}, {"position_ids": torch.arange(5).expand(2, -1)}, "batch has position_ids"),
    ],
)
def test_what_cannot_be_packed_runs_padded_and_says_why(family, injection, task, config, extra, reason, caplog):
    model = tiny_model(family, injection, task, **config).train()
    batch = {**_batches(task, count=1)[0], **extra}
    torch.manual_seed(0)
    expected = model(**batch).loss.detach()
    runner = GraphRunner(model, _optimizer(model))
    with caplog.at_level(logging.INFO, "ptv2_fast"):
        torch.manual_seed(0)
        assert_equal(runner.step(batch), expected, "loss")
        runner.step(batch)
    said = [r.getMessage() for r in caplog.records if "neither packed" in r.getMessage()]
    assert len(said) == 1 and reason in said[0]


def test_without_cuda_it_says_that_steps_are_eager(caplog):
    model = _model("llama text")
    with caplog.at_level(logging.INFO, "ptv2_fast"):
        GraphRunner(model, _optimizer(model))
    assert ["graph runner: steps run eagerly: the model is on the device type 'cpu', which has no CUDA graphs"] == [
        record.getMessage() for record in caplog.records
    ]


def test_batches_without_labels_are_refused():
    model = _model("llama text")
    runner = GraphRunner(model, _optimizer(model))
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
        sizes.add(buckets.fill(pack(batch, "TOKEN_CLS")).input_ids.shape[1])
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
    packed = pack({"input_ids": ids, "attention_mask": mask, "labels": labels}, "TOKEN_CLS")
    filled = Buckets(tokens, rows, targets).fill(packed)
    count, total = sum(lengths), filled.input_ids.shape[1]
    bounds = filled.cu_seqlens.tolist()
    assert bounds[: len(lengths) + 1] == packed.cu_seqlens.tolist()
    assert bounds[-1] == total and total % tokens == 0 and total - count < max(tokens, count / 8)
    steps = [b - a for a, b in zip(bounds, bounds[1:])]
    assert min(steps) >= 0 and max(steps) <= filled.longest
    assert torch.equal(filled.input_ids[0, :count], ids[mask == 1])
    kept = filled.targets != -100
    assert torch.equal(filled.targets[kept], ids[mask == 1])
    assert torch.equal(filled.tokens[kept], torch.arange(count))
    assert bool((filled.tokens[~kept] == total).all())


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for the device, or depend on what it holds."""

    FORBIDDEN = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.equal"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name.replace("::", ".") not in self.FORBIDDEN, func
        masks = args[1] if func is torch.ops.aten.index.Tensor else ()
        assert all(i is None or i.dtype != torch.bool for i in masks), "indexed by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_a_packed_step_never_waits_for_the_device(case, monkeypatch):
    # The CPU's attention loops over rows, and labels on the CPU are looked at: neither is so on CUDA.
    monkeypatch.setattr(hook, "prompt_attention", lambda q, k, v, pk, pv, **_: q * pk.sum() + pv.sum() + v.mean())
    for module in (heads, tasks):
        monkeypatch.setattr(module, "check_labels", lambda *_: None)
    model = _model(case)
    model.step_options = StepOptions(fused_projections=True)
    task_type, pooling = model.packed_task()
    packed = SMALL.fill(pack(_batches(CASES[case][2], count=1)[0], task_type, pooling))
    model.packed_loss(packed)  # whatever is made once
    with NoWaiting():
        loss = model.packed_loss(packed)
        loss.backward()
    assert loss.isfinite()


def test_a_padded_step_does_wait():
    model = _model("llama text")
    model.step_options = StepOptions(unpad=True)
    with pytest.raises(AssertionError, match="aten"), NoWaiting():
        model(**_batches("CAUSAL_LM", count=1)[0])


def test_what_changes_between_steps_is_captured_anew(pretend_cuda):
    batches = _batches("CAUSAL_LM", count=4) * 5
    model, plain = _model("llama text"), _model("llama text")
    plain.step_options = OFF
    optimizers = [_optimizer(m) for m in (model, plain)]
    runner = GraphRunner(model, optimizers[0], buckets=Buckets(tokens=32, rows=4, targets=32))
    for step, batch in enumerate(batches):
        if step == 8:
            for optimizer in optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 12:
            optimizers[0].zero_grad(set_to_none=True)
        if step == 14:
            model.step_options = StepOptions(last_rows=False)
        loss = runner.step(batch)
        if step in (8, 14):
            assert runner.captured == 0
        optimizers[1].zero_grad()
        expected = plain(**batch).loss
        expected.backward()
        optimizers[1].step()
        assert_equal(loss, expected.detach(), f"step {step}")
    assert runner.captured >= 1


def test_a_capture_that_fails_leaves_eager_steps(pretend_cuda, monkeypatch, caplog):
    def refuse(self, call):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(FakeCapture, "__call__", refuse)
    batches = _batches("TOKEN_CLS", count=12)
    model = _model("roberta tags, own head")
    runner = GraphRunner(model, _optimizer(model), buckets=Buckets(tokens=32, rows=4, targets=32))
    with caplog.at_level(logging.INFO, "ptv2_fast"):
        losses = torch.stack([runner.step(batch) for batch in batches])
    assert_equal(losses, _plain_losses("roberta tags, own head", batches), "losses")
    said = [r.getMessage() for r in caplog.records if "could not be captured" in r.getMessage()]
    assert len(said) >= 1 and "stream is capturing" in said[0] and runner.captured == 0


def test_rates_stay_where_graphs_read_them():
    model = _model("llama text")
    optimizer = _optimizer(model)
    runner = GraphRunner(model, optimizer)
    runner._hold_rates()
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.25
    runner._hold_rates()
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.param_groups[0]["capturable"] = False
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate


def test_texts_up_to_the_models_limit_fit():
    model = tiny_model("gpt2", "shallow", "CAUSAL_LM").train()
    ids = torch.randint(3, 30, (1, 64 - 5))
    loss = GraphRunner(model, _optimizer(model)).step({"input_ids": ids, "labels": ids})
    assert loss.isfinite()


@pytest.mark.parametrize("labels", [torch.rand(2), torch.zeros(2, 5, dtype=torch.long)])
def test_labels_of_another_kind_are_refused(labels):
    model = _model("bert rows, first token")
    with pytest.raises(ValueError, match="labels must be integers of shape"):
        GraphRunner(model, _optimizer(model)).step({"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": labels})


def test_float16_is_refused():
    model = _model("llama text")
    with pytest.raises(ValueError, match="autocast must be"):
        GraphRunner(model, _optimizer(model), autocast=torch.float16)


def test_the_switch_keeps_the_runner_eager(monkeypatch):
    model = _model("llama text")
    runner = GraphRunner(model, _optimizer(model))
    monkeypatch.setattr(runner, "_device", torch.device("cuda"))
    model.step_options = StepOptions(cuda_graphs=False)
    assert "cuda_graphs is off" in runner._why_not_captured()
    model.step_options = StepOptions(cuda_graphs=True)
    assert runner._why_not_captured() is None
    model.gradient_checkpointing_enable()
    assert "gradient checkpointing" in runner._why_not_captured()
