"""Tasks and problems whose losses no captured pass knows step aside: an eager forward, and one line that says why."""

from __future__ import annotations

import pytest
import torch

from captured_forwards import OPTIONS
from ptv2_fast import GraphRunner, HeadConfig, get_ptv2_model
from tiny_models import VOCABULARY, tiny_base, tiny_prompts
from tolerances import assert_same_bits

ROWS, CHOICES, TOKENS = 4, 2, 6
CASES = {
    "regression": (
        {"task_type": "SEQ_CLS", "heads": {"own": HeadConfig("SEQ_CLS", 1, problem_type="regression")}},
        (ROWS, TOKENS),
        torch.linspace(-1, 1, ROWS),
        "a regression loss is of no classes",
    ),
    "several labels": (
        {"task_type": "SEQ_CLS", "heads": {"own": HeadConfig("SEQ_CLS", 3, problem_type="multi_label_classification")}},
        (ROWS, TOKENS),
        torch.eye(4, 3),
        "a multi_label_classification loss is of no classes",
    ),
    "choices": (
        {"task_type": "MULTIPLE_CHOICE", "heads": {"own": 1}},
        (ROWS, CHOICES, TOKENS),
        torch.tensor([0, 1, 1, 0]),
        "a MULTIPLE_CHOICE loss is over whole rows",
    ),
}


def _model(case):
    config = dict(CASES[case][0])
    torch.manual_seed(3)
    model = get_ptv2_model(tiny_base("bert"), tiny_prompts("deep", config.pop("task_type"), **config)).train()
    model.step_options = OPTIONS
    return model


def _batch(case):
    _, shape, labels, _ = CASES[case]
    ids = torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("case", CASES)
def test_a_forward_is_eager_and_says_why(case, counts, said):
    model, batch = _model(case), _batch(case)
    losses = [model(**batch).loss for _ in range(4)]
    assert counts.warm_ups == counts.captures == 0
    assert said("not captured") == [f"training step: not captured: {CASES[case][3]}"]
    assert_same_bits(losses[0], losses[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_runner_steps_eagerly(case, counts, said):
    model, batch = _model(case), _batch(case)
    runner = GraphRunner(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    losses = [float(runner.step(batch)) for _ in range(6)]
    assert losses[-1] < losses[0] and runner.captured == 0
    assert CASES[case][3] in said("eagerly")[0]
