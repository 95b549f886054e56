"""The table of tasks: every row leads to what it names, and no other file lists the tasks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import transformers
from transformers import modeling_outputs

from ptv2_fast import choices
from ptv2_fast.task_models import retrieval
from ptv2_fast.task_models.classes import MODEL_CLASSES
from ptv2_fast.task_types import PROBLEM_TYPES, TASKS, TRAINED_TASKS
from ptv2_fast.training import options
from ptv2_fast.training.data.tasks import reading_task
from ptv2_fast.training.metrics import METRICS
from ptv2_fast.training.tasks import BY_PREDICTION, training_task

PACKAGE = Path(__file__).parents[1] / "ptv2_fast"
# The table itself, and the one place that knows the models' classes.
MAY_LIST_TASKS = {"task_types.py", "task_models/classes.py"}


@pytest.mark.parametrize("name", TASKS)
def test_a_row_names_what_transformers_has(name):
    row = TASKS[name]
    auto = getattr(transformers, row.auto_class)
    if row.class_suffix is not None:
        classes = {one for model in auto._model_mapping._model_mapping.values() for one in _as_tuple(model)}
        assert any(one.endswith(row.class_suffix) for one in classes)
    assert hasattr(modeling_outputs, row.output_class) or hasattr(retrieval, row.output_class)
    assert row.gives in ("row", "token", "span", "text", "states")
    assert row.has_head == (row.class_suffix is not None)
    # transformers asks this list before it logs that a pipeline does not know a model.
    supported = getattr(transformers.pipelines.base, "SUPPORTED_PEFT_TASKS", {})
    for pipeline in row.pipelines if supported else ():
        assert MODEL_CLASSES[name].__name__ in supported[pipeline]


def _as_tuple(names):
    return names if isinstance(names, tuple) else (names,)


def test_every_task_has_a_model():
    assert list(MODEL_CLASSES) == list(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_training_serves_a_task_wholly_or_refuses_it(name):
    row = TASKS[name]
    if name not in TRAINED_TASKS:
        assert (row.max_length, row.predicts, row.metric) == (None, None, None)
        with pytest.raises(ValueError, match=f"task_type must be one of {', '.join(TRAINED_TASKS)}; got '{name}'"):
            training_task(name)
        return
    assert row.max_length is not None and row.metric in METRICS and row.predicts in BY_PREDICTION
    task = training_task(name)
    assert reading_task(name).columns is not None
    # Predictions that are compared with the examples' own, or scores of another way.
    compared = all((task.truth, task.read, task.decode, task.record))
    assert compared != (task.score is not None and task.records is not None)


def _listed(tree: ast.AST) -> list[int]:
    """Lines of literals that hold three tasks or more."""
    found = []
    for node in ast.walk(tree):
        members = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        names = {one.value for one in members if isinstance(one, ast.Constant)}
        if len(names & set(TASKS)) > 2:
            found.append(node.lineno)
    return found


def test_the_tasks_are_listed_once():
    files = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    listing = {name for name, path in files.items() if _listed(ast.parse(path.read_text(encoding="utf-8")))}
    assert listing <= MAY_LIST_TASKS
    assert _listed(ast.parse("x = ('SEQ_CLS', 'TOKEN_CLS', 'CAUSAL_LM')")) == [1]
    assert _listed(ast.parse("x = {'SEQ_CLS': 1, 'TOKEN_CLS': 2, 'IMAGE_CLS': 3}")) == [1]


def test_the_command_line_s_choices_are_the_tables_own():
    words = {
        options.Task: TRAINED_TASKS,
        options.Problem: PROBLEM_TYPES,
        options.Injection: choices.INJECTIONS,
        options.Init: choices.INITS,
        options.Pooling: choices.POOLINGS,
        options.Schedule: choices.SCHEDULES,
        options.Content: choices.EXPORTS,
    }
    for kind, expected in words.items():
        assert tuple(member.value for member in kind) == expected
