"""What captured steps find by its address, on its own: what is replaced is seen, whatever comes to lie where it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ptv2_fast.step.held import HeldGradients, HeldModel, HeldOptimizer

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


def _small_model():
    """Weights and a buffer of every kind, one of them trained."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), nn.ReLU())
    model.register_buffer("none", None)
    model.requires_grad_(False)[0].requires_grad_(True)
    return model


def _assign_none(model):
    model[1][1].bias = None


def _delete(model):
    del model[1][1].bias


def _equal_weight(model):
    model[1][1].bias = nn.Parameter(model[1][1].bias.clone(), requires_grad=False)


def _without_address(model):
    model[1][1].bias = nn.Parameter(torch.ones(1).to_sparse(), requires_grad=False)


def _cast(model):
    model[1][1].bias.data = model[1][1].bias.data.double()


def _equal_buffer(model):
    model[1][0].num_batches_tracked = model[1][0].num_batches_tracked.clone()


def _remove_module(model):
    del model[2]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_assign_none, "weights were moved, cast or replaced"),
        (_delete, "weights were moved, cast or replaced"),
        (_equal_weight, "weights were moved, cast or replaced"),
        (_without_address, "weights were moved, cast or replaced"),
        (_cast, "weights were moved, cast or replaced"),
        (_equal_buffer, "buffers were moved, cast or replaced"),
        (_remove_module, "a module was replaced"),
        (lambda model: model[1].add_module("1", nn.Linear(3, 1)), "a module was replaced"),
        (lambda model: model[0].requires_grad_(False), "the optimizer trains other parameters"),
    ],
)
def test_what_a_pass_relies_on_is_compared(change, why):
    """Weights of one element too, which compare as equal where they are not the same."""
    model = _small_model()
    held = HeldModel(model, torch.optim.SGD(model[0].parameters(), lr=1.0))
    assert held.changed() is None and held.others_changed() is None
    change(model)
    assert held.changed() == why


def test_values_may_change_where_they_are():
    model = _small_model()
    held = HeldModel(model, torch.optim.SGD(model[0].parameters(), lr=1.0))
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1][0].running_mean):
            tensor.add_(1.0)
    assert held.changed() is None and held.others_changed() is None


def test_whether_modules_train_is_a_number_that_they_compute_with():
    model = _small_model()
    held = HeldModel(model, torch.optim.SGD(model[0].parameters(), lr=1.0))
    model[1].eval()
    assert held.changed() == "modules train, drop or scale otherwise, or have other settings"
    model.train()
    assert held.changed() is None


def test_another_group_is_another_optimizer():
    model = _small_model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0)
    held = HeldModel(model, optimizer)
    optimizer.add_param_group({"params": list(model[1][1].parameters())})
    assert held.changed() == "the optimizer trains other parameters"


def test_who_else_trains_is_another_question():
    model = _small_model()
    held = HeldModel(model, torch.optim.SGD(model[0].parameters(), lr=1.0))
    model[1][1].bias.requires_grad_(True)
    assert held.changed() is None and held.others_changed() == "other parameters train"
    model[1][1].bias.requires_grad_(False)
    assert held.others_changed() is None
