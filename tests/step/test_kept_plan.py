"""A plan is decided again only where what it depends on is another, and logged once."""

from __future__ import annotations

import logging

import pytest
import torch

from ptv2_fast.step.float8_plan import Float8Found
from ptv2_fast.step.kept_plan import KeptPlan
from ptv2_fast.step.options import StepOptions

ASKED = {
    "training": True, "device": torch.device("cpu"), "backend": "torch", "weights_owner": None, "without": {},
    "find_float8": lambda: Float8Found(maps=1, served=1, stay={}),
}  # fmt: skip


def test_the_same_question_has_the_same_plan():
    plans = KeptPlan()
    first = plans.of(StepOptions(), **ASKED)
    assert plans.of(StepOptions(), **ASKED) is first


@pytest.mark.parametrize(
    "changes",
    [{"training": False}, {"weights_owner": "FSDP2"}, {"device": torch.device("meta")}],
    ids=str,
)
def test_another_question_has_its_own(changes):
    plans = KeptPlan()
    first = plans.of(StepOptions(), **ASKED)
    assert plans.of(StepOptions(), **{**ASKED, **changes}) != first
    assert plans.of(StepOptions(), **ASKED) == first


def test_a_switch_is_seen():
    plans = KeptPlan()
    assert plans.of(StepOptions(unpad=True), **ASKED).unpad
    assert not plans.of(StepOptions(unpad=False), **ASKED).unpad


def test_each_plan_is_logged_once(caplog):
    plans = KeptPlan()
    with caplog.at_level(logging.INFO, logger="ptv2_fast"):
        for training in (True, False, True, False):
            plans.of(StepOptions(), **{**ASKED, "training": training})
    assert len(caplog.records) == 2
