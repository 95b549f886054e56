"""The page on data: each example is read as it says, and its table of formats is the one that the code has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ptv2_fast.training.data import read_examples
from ptv2_fast.training.data.formats import FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
# A file by its name, and behind it what it becomes by the task and, perhaps, the problem.
EXAMPLES = re.findall(r"```\w+ (\w+\.\w+)\n(.*?)```\n\n```json ([A-Z_]+) ?(\w*)\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize(("name", "content", "task", "problem", "becomes"), EXAMPLES, ids=[one[0] for one in EXAMPLES])
def test_an_example_is_read_as_the_page_says(tmp_path, name, content, task, problem, becomes):
    (tmp_path / name).write_text(content, encoding="utf-8")
    expected = [json.loads(line) for line in becomes.splitlines()]
    assert read_examples(tmp_path / name, task, problem_type=problem or None) == expected


def test_the_page_has_every_suffix_and_no_other():
    assert len(EXAMPLES) == len(re.findall(r"```json [A-Z]", PAGE))
    table = PAGE.split("## Files and folders")[1].split("## Records")[0]
    named = set(re.findall(r"`(\.\w+)`", table)) - {".gz"}
    assert named == {suffix for kind in FORMATS.values() for suffix in kind.suffixes}
