"""Every saving on, under checkpointing, autocast, accumulation, adapters and two processes: the plain losses."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks.stand_in import captured_on_cpu
from processes import forkserver, free_port
from ptv2_fast import get_ptv2_model
from ptv2_fast.step.capture import WARM_UP_STEPS
from ptv2_fast.step.graph_runner import GraphRunner
from ptv2_fast.step.options import StepOptions
from tiny_models import tiny_base, tiny_model, tiny_prompts
from tolerances import assert_equal

OFF = StepOptions(**{field.name: False for field in fields(StepOptions)})
# Compiled layers have their own tests: each variant compiles for seconds.
ON = StepOptions(**{f.name: f.name not in ("compile_layers", "float8") for f in fields(StepOptions)})
CASES = [("bert", "TOKEN_CLS"), ("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM")]
STEPS = 6


def _batch(task: str, step: int, rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = 6 + step
    lengths = torch.randint(2, tokens + 1, (rows,), generator=generator)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.randint(3, 30, (rows, tokens), generator=generator).masked_fill(mask == 0, 1)
    if task == "SEQ_CLS":
        labels = torch.randint(0, 3, (rows,), generator=generator)
    else:
        labels = torch.randint(0, 3, (rows, tokens), generator=generator).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _model(family: str, task: str, options: StepOptions):
    torch.manual_seed(4)
    changes = {} if task == "CAUSAL_LM" else {"classifier_dropout": 0.0}
    model = tiny_model(family, "deep", task, base_changes=changes).train()
    model.step_options = options
    return model


def _losses(model, task: str, *, accumulate: int = 1, autocast: bool = False) -> torch.Tensor:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**_batch(task, step * accumulate + part)).loss / accumulate
            loss.backward()
            losses.append(loss.detach().float())
        optimizer.step()
    return torch.stack(losses)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_gradient_checkpointing(family, task):
    model = _model(family, task, ON)
    model.gradient_checkpointing_enable()
    assert_equal(_losses(model, task), _losses(_model(family, task, OFF), task), "losses")


@pytest.mark.parametrize(("family", "task"), CASES)
def test_accumulation(family, task):
    found = _losses(_model(family, task, ON), task, accumulate=2)
    assert_equal(found, _losses(_model(family, task, OFF), task, accumulate=2), "losses")


@pytest.mark.parametrize(("family", "task"), CASES)
def test_autocast(family, task):
    found = _losses(_model(family, task, ON), task, autocast=True)
    plain = _losses(_model(family, task, OFF), task, autocast=True)
    exact = _losses(_model(family, task, OFF), task)
    # Sums run in another order: the savings may be as far from the plain form as that is from float32.
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3


def test_half_precision_base():
    found, plain = (_model("llama", "CAUSAL_LM", options) for options in (ON, OFF))
    for model in (found, plain):
        model.base_model.to(torch.bfloat16)
    difference = _losses(found, "CAUSAL_LM") - _losses(plain, "CAUSAL_LM")
    assert difference.abs().max() < 0.05


@pytest.mark.parametrize("options", [OFF, ON], ids=["off", "on"])
def test_adapters_trained_in_turn_do_not_touch_each_other(options):
    model = _model("llama", "CAUSAL_LM", options)
    torch.manual_seed(6)
    model.add_adapter("other", tiny_prompts("prefix", "CAUSAL_LM"))
    model.set_adapter("other")
    _losses(model, "CAUSAL_LM")
    model.set_adapter("default")
    assert_equal(_losses(model, "CAUSAL_LM"), _losses(_model("llama", "CAUSAL_LM", OFF), "CAUSAL_LM"), "losses")


def test_a_batch_of_several_adapters():
    models = []
    for options in (OFF, ON):
        model = _model("llama", "CAUSAL_LM", options)
        torch.manual_seed(6)
        model.add_adapter("other", tiny_prompts("prefix", "CAUSAL_LM", length=3))
        models.append(model.requires_grad_(True))
    names = ["default", "other", "other", "default"]
    plain, found = (model(**_batch("CAUSAL_LM", 0), adapter_names=names).loss for model in models)
    assert_equal(found, plain, "loss")
    for loss in (plain, found):
        loss.backward()
    for expected, parameter in zip(models[0].adapters.parameters(), models[1].adapters.parameters(), strict=True):
        assert_equal(parameter.grad, expected.grad, "gradient")


def _train_one_rank(rank: int, world: int, port: int, results: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    found = [_rank_losses(rank, world, with_runner) for with_runner in (False, True)]
    # Long enough for replays: gradients are averaged between a captured pass and the captured update.
    with captured_on_cpu() as counts:
        found.append(_rank_losses(rank, world, True))
    assert counts.replays > 0
    # DDP's hooks average what the model's own forward has captured.
    with captured_on_cpu() as counts:
        found.append(_rank_losses(rank, world, False))
    assert counts.captures == 1 and counts.replays == STEPS - WARM_UP_STEPS
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def _rank_losses(rank: int, world: int, with_runner: bool) -> list[float]:
    """Losses, the mean over the processes, of DDP's loop or of the graph runner's steps."""
    model = _causal_model(ON)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    wrapped = GraphRunner(model, optimizer) if with_runner else DistributedDataParallel(model)
    losses = []
    for step in range(STEPS):
        batch = {name: value.chunk(world)[rank] for name, value in _even_batch(step).items()}
        if with_runner:
            total = wrapped.step(batch) / world
        else:
            optimizer.zero_grad()
            loss = wrapped(**batch).loss
            loss.backward()
            optimizer.step()
            total = loss.detach() / world
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def _causal_model(options: StepOptions):
    torch.manual_seed(4)
    base = tiny_base("llama", "CAUSAL_LM")
    return get_ptv2_model(base, tiny_prompts("deep", "CAUSAL_LM"), step_options=options).train()


def _even_batch(step: int) -> dict[str, torch.Tensor]:
    """As many labels in each half, so that the mean over processes is the mean over the batch."""
    batch = _batch("CAUSAL_LM", step)
    half = {name: value[:2] for name, value in batch.items()}
    ids = torch.cat([half["input_ids"], half["input_ids"].flip(0)])
    mask = torch.cat([half["attention_mask"], half["attention_mask"].flip(0)])
    shift = torch.where(mask == 1, (ids + torch.arange(4)[:, None]) % 30 + 3, 1)
    return {"input_ids": shift, "attention_mask": mask, "labels": shift.masked_fill(mask == 0, -100)}


def test_two_processes_give_the_losses_of_one():
    results = forkserver().SimpleQueue()
    mp.start_processes(_train_one_rank, args=(2, free_port(), results), nprocs=2, start_method="forkserver")
    model = _causal_model(OFF)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    expected = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**_even_batch(step)).loss
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for found in results.get():
        assert_equal(torch.tensor(found), torch.tensor(expected), "losses")


def test_nothing_is_kept_below_the_first_prompted_layer():
    kept = {}
    for layers in (None, [-1]):
        model = tiny_model("llama", "deep", base_changes={"num_hidden_layers": 4}, layers=layers).train()
        sizes = []

        def count(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(**{name: _batch("TOKEN_CLS", 0)[name] for name in ("input_ids", "attention_mask")})
        kept[layers is None] = sum(sizes)
    assert kept[False] < 0.35 * kept[True]
