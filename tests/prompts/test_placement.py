"""Where prompts stand beside a text: in its rows or in its layers, and how far its positions shift."""

from __future__ import annotations

import pytest

from ptv2_fast import PTuningV2Config
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.families.registry import family_of
from ptv2_fast.prompts.placement import is_inline, stack_offset, text_offset
from tiny_models import tiny_base


def _family(name: str):
    return family_of(backbone_of(tiny_base(name)))


def _config(injection: str, task: str = "FEATURE_EXTRACTION", **changes):
    return PTuningV2Config(task, num_virtual_tokens=5, injection=injection, **changes)


@pytest.mark.parametrize(("name", "inline"), [("bert", True), ("mpnet", True), ("llama", False), ("gpt2", False)])
def test_shallow_prompts_are_rows_where_text_sees_ahead(name, inline):
    family = _family(name)
    assert is_inline(_config("shallow"), family) is inline
    assert not is_inline(_config("deep"), family) and not is_inline(_config("prefix"), family)


def test_a_shallow_prompt_takes_positions_that_are_learned():
    assert text_offset(_config("shallow"), _family("bert")) == 5
    assert text_offset(_config("shallow"), _family("gpt2")) == 5
    assert text_offset(_config("shallow"), _family("llama")) == 0
    assert text_offset(_config("deep"), _family("bert")) == 0
    assert text_offset(_config("prefix", position_offset=3), _family("bert")) == 3


def test_a_stack_shifts_by_the_offset_of_a_prompt_in_its_self_attention():
    task = "SEQ_2_SEQ_LM"
    both = _config("prefix", task, position_offset=4)
    assert [stack_offset(both, stack) for stack in ("encoder", "decoder")] == [4, 4]
    one = _config("prefix", task, position_offset=4, stacks=("decoder", "cross"))
    assert [stack_offset(one, stack) for stack in ("encoder", "decoder")] == [0, 4]
    assert [stack_offset(_config("shallow", task), stack) for stack in ("encoder", "decoder")] == [0, 0]
    heads = _config("prefix", "SEQ_CLS", position_offset=4, heads={"own": 2})
    assert [stack_offset(heads, stack) for stack in ("encoder", "decoder")] == [4, 0]
