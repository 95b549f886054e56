"""Who trains prompts at a rate for whole models is told so, once, and nobody else."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR
from transformers import Trainer, TrainingArguments

from ptv2_fast import PTuningV2Config, get_ptv2_model
from tiny_folders import tiny_bert

Adam, SGD = torch.optim.AdamW, torch.optim.SGD


def model_of(**config):
    return get_ptv2_model(tiny_bert(), PTuningV2Config("SEQ_CLS", num_virtual_tokens=2, heads={"task": 2}, **config))


def rows_of(labels=(0, 1, 0, 1)):
    return [{"input_ids": [2, 7, 8, 3], "attention_mask": [1, 1, 1, 1], "labels": label} for label in labels]


def steps(model, optimizer, scheduler=None, count=4) -> None:
    for _ in range(count):
        model.train()
        batch = {name: torch.tensor([row[name] for row in rows_of()]) for name in rows_of()[0]}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(("rate", "warned"), [(None, True), (9e-4, True), (1e-3, False), (2e-2, False)])
@pytest.mark.parametrize("warmup", [0, 2])
def test_trainer_is_told_of_a_low_rate_once(tmp_path, caplog, rate, warmup, warned):
    given = {} if rate is None else {"learning_rate": rate}
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, warmup_steps=warmup, report_to=[], disable_tqdm=True,
        save_strategy="no", **given,
    )  # fmt: skip
    Trainer(model=model_of(), args=args, train_dataset=rows_of()).train()
    said = [record.getMessage() for record in caplog.records if record.name == "ptv2_fast.prompts.learning_rate"]
    assert len(said) == warned
    assert all("learning_rate=0.01" in line for line in said)


def by_hand(model):
    """A rate that somebody raises by hand."""
    optimizer = Adam(trained(model), lr=1e-5)

    class Raised:
        def step(self):
            optimizer.param_groups[0]["lr"] *= 10

    return optimizer, Raised()


def scheduled(kind, rate=1e-2, **options):
    def make(model):
        optimizer = Adam(trained(model), lr=rate)
        return optimizer, kind(optimizer, **options)

    return make


def with_frozen_prompts(model):
    model.adapters["default"].encoder.requires_grad_(False)
    return Adam(trained(model), lr=5e-5), None


def with_the_base(model):
    model.base_model.requires_grad_(True)
    return Adam(trained(model), lr=5e-5), None


def with_a_group_for_the_base(model):
    lora = torch.nn.Parameter(torch.zeros(2))
    return Adam([{"params": [lora], "lr": 1e-4}, {"params": trained(model), "lr": 1e-2}]), None


QUIET = {
    "usual": lambda model: (Adam(trained(model), lr=1e-2), None),
    "warm-up": scheduled(LambdaLR, lr_lambda=lambda step: step / 10),
    "one-cycle": scheduled(OneCycleLR, max_lr=1e-2, total_steps=10),
    "cyclic": scheduled(CyclicLR, rate=1e-5, base_lr=1e-5, max_lr=1e-2, step_size_up=3),
    "by-hand": by_hand,
    "frozen-prompts": with_frozen_prompts,
    "whole-model": with_the_base,
    "groups": with_a_group_for_the_base,
    "sgd": lambda model: (SGD(trained(model), lr=5e-5), None),
}


@pytest.mark.parametrize("kind", QUIET)
def test_no_false_alarm(caplog, kind):
    model = model_of()
    steps(model, *QUIET[kind](model))
    assert not [record for record in caplog.records if record.name == "ptv2_fast.prompts.learning_rate"]


def test_prompts_of_an_mlp_train_at_low_rates(caplog):
    model = model_of(reparameterization=4, injection="prefix")
    steps(model, Adam(trained(model), lr=1e-4))
    assert not [record for record in caplog.records if record.name == "ptv2_fast.prompts.learning_rate"]


def test_a_loop_by_hand_is_told_too_and_another_model_again(caplog):
    for _ in range(2):
        model = model_of()
        steps(model, Adam(trained(model), lr=5e-5))
    assert len([record for record in caplog.records if record.name == "ptv2_fast.prompts.learning_rate"]) == 2


def warnings_of(caplog) -> int:
    return len([record for record in caplog.records if record.name == "ptv2_fast.prompts.learning_rate"])


@pytest.mark.parametrize("rate", [5e-5, torch.tensor(5e-5)], ids=["float", "tensor"])
def test_who_never_calls_train_is_told_too(caplog, rate, monkeypatch):
    """A fresh model is in training mode; and what other models do meanwhile does not count."""
    model, other = model_of(), torch.nn.Linear(2, 2)
    elsewhere = Adam(other.parameters())
    for _ in range(20):
        other(torch.ones(2)).sum().backward()
        elsewhere.step()
    steps(model, Adam(trained(model), lr=rate))
    assert warnings_of(caplog) == 1
    model = model_of()
    monkeypatch.setattr(type(model), "train", lambda model, mode=True: model)
    steps(model, Adam(trained(model), lr=rate))
    assert warnings_of(caplog) == 2


def test_each_adapter_is_looked_at_and_each_once(caplog):
    model = model_of()
    steps(model, Adam(trained(model), lr=1e-2))
    model.add_adapter("two", PTuningV2Config("SEQ_CLS", num_virtual_tokens=2, heads={"task": 2}))
    model.set_adapter("two")
    for _ in range(2):
        steps(model, Adam(trained(model), lr=1e-4))
    assert warnings_of(caplog) == 1
    model.set_adapter("default")
    steps(model, Adam(trained(model), lr=1e-2))
    assert warnings_of(caplog) == 1


def test_a_low_rate_that_falls_by_hand_is_low(caplog):
    model = model_of()
    optimizer = Adam(trained(model), lr=1e-4)

    class Falling:
        def step(self):
            optimizer.param_groups[0]["lr"] *= 0.9

    steps(model, optimizer, Falling())
    assert warnings_of(caplog) == 1


def test_a_bare_base_is_not_looked_at(tmp_path, caplog):
    from transformers import BertForSequenceClassification

    base = BertForSequenceClassification(tiny_bert().config)
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    Trainer(model=base, args=args, train_dataset=rows_of()).train()
    assert not [record for record in caplog.records if record.name == "ptv2_fast.prompts.learning_rate"]
