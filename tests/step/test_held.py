"""What captured steps find by its address, on its own: what is replaced is seen, whatever comes to lie where it was."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ptv2_fast.step.held import HeldGradients, HeldOptimizer

CPU = torch.device("cpu")


def _stepped():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    weight.grad = torch.ones(3)
    optimizer.step()
    return weight, optimizer


def test_a_state_that_lies_where_a_freed_one_was_is_another_one():
    _, optimizer = _stepped()
    held = HeldOptimizer(optimizer, CPU, capturable=False)
    held.hold()
    assert held.hold() is None
    (state,) = optimizer.state.values()
    place, made = id(state["exp_avg"]), []
    state["exp_avg"] = None
    while len(made) < 1000 and (not made or id(made[-1]) != place):
        made.append(torch.zeros(3))
    state["exp_avg"] = made[-1]
    assert held.hold() == "the optimizer's state was replaced"
    assert held.hold() is None
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert held.hold() == "the optimizer's state was replaced"


def test_rates_stay_where_graphs_read_them():
    _, optimizer = _stepped()
    held = HeldOptimizer(optimizer, CPU, capturable=False)
    held.hold()
    group = optimizer.param_groups[0]
    rate = group["lr"]
    group["lr"] = 0.25
    assert held.hold() is None and group["lr"] is rate and rate.item() == 0.25
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert held.hold() is None and group["lr"] is rate and rate.item() == 0.125
    group["lr"] = torch.tensor(0.75, dtype=torch.float64)
    assert held.hold() is None and group["lr"] is rate and rate.item() == 0.75


def test_only_what_captures_for_real_asks_for_capturable():
    for capturable in (False, True):
        _, optimizer = _stepped()
        HeldOptimizer(optimizer, CPU, capturable).hold()
        assert optimizer.param_groups[0]["capturable"] is capturable


def test_settings_of_every_kind_are_compared_without_a_wait():
    _, optimizer = _stepped()
    held = HeldOptimizer(optimizer, CPU, capturable=False)
    held.hold()
    group = optimizer.param_groups[0]
    for name, value in (("betas", (0.5, 0.9)), ("eps", torch.tensor(1e-6)), ("betas", (torch.tensor(0.5), 0.9))):
        group[name] = value
        assert held.hold() == "the optimizer's settings changed"
        assert held.hold() is None


def test_a_group_more_is_another_optimizer():
    _, optimizer = _stepped()
    held = HeldOptimizer(optimizer, CPU, capturable=False)
    held.hold()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert held.hold() is not None
    assert [group["lr"].item() for group in optimizer.param_groups] == [torch.tensor(1e-2).item(), 0.5]


def test_without_a_gradient_there_is_nothing_to_hold():
    model = nn.Linear(2, 2)
    held = HeldGradients(model, torch.optim.SGD(model.parameters(), lr=1.0))
    model.weight.grad = torch.ones(2, 2)
    assert held.begin() is False and model.weight.grad is None
