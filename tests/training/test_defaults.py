"""What is trained with where nobody says otherwise is what the kept table of quality chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptv2_fast.training.defaults import Defaults, defaults_for

CELLS = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "quality_minilm_cpu.json").read_text(encoding="utf-8")
)["cells"]
TASKS = {"sst2": "SEQ_CLS", "wnut17": "TOKEN_CLS", "smollm2": "CAUSAL_LM"}


@pytest.mark.parametrize("cell", [name for name in CELLS if name.split("/")[1] in ("deep", "shallow", "prefix")])
def test_the_defaults_are_those_that_the_table_chose(cell):
    task, injection = cell.split("/")
    chosen, found = CELLS[cell]["final"], defaults_for(TASKS[task], injection)
    assert found.num_virtual_tokens == chosen["num_virtual_tokens"]
    assert found.learning_rate == chosen["learning_rate"]
    assert found.epochs >= chosen["best_epoch"]


def test_what_was_not_measured_has_what_classes_have():
    assert defaults_for("QUESTION_ANS", "deep") == defaults_for("SEQ_CLS", "deep") == Defaults()
