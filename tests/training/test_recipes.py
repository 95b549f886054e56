"""The recipes: complete, consistent, and a sample of rows compared value by value."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict

import pytest

from ptv2_fast.training.data import TASKS
from ptv2_fast.training.metrics import metric_for
from ptv2_fast.training.recipes import RECIPES, get_recipe


def test_every_released_run_has_a_recipe():
    bert = "boolq copa rte wic wsc conll04 ontonotes conll12".split()
    roberta = [*bert, "conll03", "conll05", "squad1", "squad2"]
    names = {f"{task}-bert-large" for task in bert} | {f"{task}-roberta-large" for task in roberta}
    assert set(RECIPES) == names


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rte-bert-large", (20, 1e-2, 60, 32, 128, 0.1, None, "linear", "accuracy", "80.1")),
        ("wic-bert-large", (20, 1e-4, 80, 16, 128, 0.1, 512, "linear", "accuracy", "75.1")),
        ("copa-roberta-large", (8, 9e-3, 120, 16, 128, 0.1, None, "linear", "accuracy", "92.0")),
        ("conll03-roberta-large", (11, 3e-2, 30, 16, 152, 0.1, None, "exponential", "f1", "91.8")),
        ("conll04-bert-large", (128, 2e-2, 40, 32, 128, 0.2, None, "exponential", "f1", "84.5")),
        ("conll05-roberta-large", (224, 6e-3, 15, 16, 128, 0.1, None, "exponential", "f1", "89.4")),
        ("squad2-roberta-large", (8, 5e-3, 10, 8, 384, 0.2, None, "exponential", "f1", "81.3")),
    ],
)
def test_values(name, values):
    recipe = get_recipe(name)
    assert (
        recipe.num_virtual_tokens,
        recipe.learning_rate,
        recipe.epochs,
        recipe.batch_size,
        recipe.max_length,
        recipe.dropout,
        recipe.reparameterization_hidden_size,
        recipe.lr_schedule,
        recipe.metric,
        recipe.result.split()[0],
    ) == values
    assert recipe.base.endswith("cased" if "-bert-" in name else "roberta-large")


@pytest.mark.parametrize("name", RECIPES)
def test_consistent(name):
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.task_type in TASKS
    assert metric_for(recipe.task_type).name == recipe.metric
    assert (recipe.doc_stride is not None) == (recipe.task_type == "QUESTION_ANS")
    assert (recipe.lr_schedule == "linear") == (recipe.task_type in ("SEQ_CLS", "MULTIPLE_CHOICE"))
    assert (recipe.weight_decay, recipe.max_grad_norm, recipe.lr_decay) == (0.0, 1.0, 0.95)
    with pytest.raises(FrozenInstanceError):
        recipe.epochs = 1
    assert asdict(recipe)["name"] == name


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError) as caught:
        get_recipe("rte")
    assert "got 'rte'" in str(caught.value)
    assert all(name in str(caught.value) for name in RECIPES)
