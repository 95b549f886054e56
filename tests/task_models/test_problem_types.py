"""Regression and several labels a row, by heads of our own: losses, what is refused, and what is saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import TextClassificationPipeline

from batches import padded, text_rows
from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.inputs.pooling import pool
from ptv2_fast.losses import multi_label_loss, regression_loss
from ptv2_fast.task_types import PROBLEM_TYPES, TASKS
from tiny_models import HIDDEN, literal_states, tiny_base, tiny_model, tiny_prompts
from tolerances import assert_equal, assert_same_bits

BATCH = padded(text_rows(), "left")
REGRESSION, SEVERAL = "regression", "multi_label_classification"
NUMBERS = torch.tensor([0.5, -2.0, 3.25])
SETS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


def _model(problem, num_labels, pooling="mean"):
    heads = {"own": HeadConfig("SEQ_CLS", num_labels, pooling=pooling, problem_type=problem)}
    return get_ptv2_model(tiny_base("bert"), tiny_prompts("deep", "SEQ_CLS", heads=heads)).eval()


# The losses, by their formulas in float64.


def test_regression_is_the_mean_squared_error():
    logits = torch.randn(4, 1, dtype=torch.float64)
    labels = torch.randn(4, dtype=torch.float64)
    expected = sum((float(x) - float(y)) ** 2 for x, y in zip(logits[:, 0], labels, strict=True)) / 4
    for shaped in (labels, labels[:, None]):
        assert float(regression_loss(logits, shaped)) == pytest.approx(expected, rel=1e-12)
    several, targets = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    assert float(regression_loss(several, targets)) == pytest.approx(
        float(((several - targets) ** 2).mean()), rel=1e-12
    )


def test_several_labels_are_so_many_yes_or_no_questions():
    logits = torch.randn(3, 3, dtype=torch.float64) * 4
    yes = torch.sigmoid(logits)
    expected = -(SETS * yes.log() + (1 - SETS) * (1 - yes).log()).mean()
    assert float(multi_label_loss(logits, SETS.double())) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("loss", [regression_loss, multi_label_loss])
def test_the_loss_of_half_precision_is_computed_in_float32(loss):
    logits = torch.tensor([[0.1, 2.0], [3.0, -1.0]]).bfloat16()
    labels = torch.tensor([[0.3, 1.0], [0.7, 0.0]])
    found = loss(logits, labels)
    assert found.dtype == torch.float32
    assert_equal(found, loss(logits.float(), labels))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("problem", "count"), [(REGRESSION, 1), (REGRESSION, 3), (SEVERAL, 3)])
def test_a_head_over_the_literal_states_gives_the_same_loss_and_gradient(family, problem, count):
    heads = {"own": HeadConfig("SEQ_CLS", count, pooling="mean", problem_type=problem)}
    model = tiny_model(family, "deep", "SEQ_CLS", exact=True, heads=heads)
    labels = NUMBERS.double() if (problem, count) == (REGRESSION, 1) else SETS.double()
    output = model(**BATCH.inputs, labels=labels)
    prompts = model.adapters["default"].encoder.prompts
    (gradient,) = torch.autograd.grad(output.loss, prompts)
    backbone = backbone_of(tiny_base(family, "SEQ_CLS", exact=True))
    states = literal_states(model, backbone, BATCH.input_ids, BATCH.attention_mask)
    logits = model.adapters["default"].heads["own"].linear(pool(states, BATCH.attention_mask, "mean"))
    assert_equal(output.logits, logits)
    if problem == REGRESSION:
        literal = ((logits - labels.view(logits.shape)) ** 2).mean()
    else:
        yes = logits.sigmoid()
        literal = -(labels * yes.log() + (1 - labels) * (1 - yes).log()).mean()
    assert_equal(output.loss, literal)
    assert_equal(gradient, torch.autograd.grad(literal, prompts)[0])


def test_a_loss_that_somebody_sets_is_the_one_that_is_taken():
    model = _model(REGRESSION, 1)
    model.base_model.loss_function = lambda logits, labels, **kwargs: (logits[:, 0] - labels).abs().sum()
    output = model(**BATCH.inputs, labels=NUMBERS)
    assert_equal(output.loss, (output.logits[:, 0] - NUMBERS).abs().sum())


# What is refused.


@pytest.mark.parametrize(
    ("problem", "count", "labels", "message"),
    [
        (REGRESSION, 1, torch.tensor([1, 2, 3]), "labels must be floating-point numbers; got torch.int64"),
        (REGRESSION, 1, [0.5, 1.0, 2.0], "labels must be a tensor of floating-point numbers; got list"),
        (REGRESSION, 1, SETS, r"labels must have shape \(3, 1\) or \(3,\); got \(3, 3\)"),
        (REGRESSION, 3, NUMBERS, r"labels must have shape \(3, 3\); got \(3,\)"),
        (REGRESSION, 1, torch.tensor([0.0, float("nan"), 1.0]), r"labels must be finite; got \[nan\]"),
        (SEVERAL, 3, SETS.long(), "labels must be floating-point numbers; got torch.int64"),
        (SEVERAL, 3, torch.tensor([0.0, 1.0, 2.0]), r"labels must have shape \(3, 3\); got \(3,\)"),
        (SEVERAL, 3, SETS * -100, r"labels must lie in \[0, 1\]; got \[-100.0, -100.0"),
    ],
    ids=["integers", "list", "too-wide", "too-narrow", "nan", "integer-sets", "one-for-each", "outside"],
)
def test_labels_of_another_kind_are_refused(problem, count, labels, message):
    with pytest.raises(ValueError, match=message):
        _model(problem, count)(**BATCH.inputs, labels=labels)


def test_a_single_label_is_refused_where_it_is_a_number():
    with pytest.raises(ValueError, match="labels must be integers; got torch.float32"):
        _model(PROBLEM_TYPES[0], 3)(**BATCH.inputs, labels=NUMBERS)


@pytest.mark.parametrize("task", [name for name, row in TASKS.items() if row.has_head])
def test_only_heads_over_rows_solve_other_problems(task):
    count = 2 if task == "QUESTION_ANS" else 1
    if TASKS[task].solves_others:
        assert HeadConfig(task, count, problem_type=REGRESSION).problem_type == REGRESSION
        return
    with pytest.raises(ValueError, match=f"problem_type must be 'single_label_classification' for {task}; got 'reg"):
        HeadConfig(task, count, problem_type=REGRESSION)


def test_an_unknown_problem_is_refused():
    with pytest.raises(ValueError, match="problem_type must be one of single_label_.*, regression, .*; got 'ranking'"):
        HeadConfig("SEQ_CLS", 2, problem_type="ranking")


# What is kept.


@pytest.mark.parametrize(("problem", "count"), [(REGRESSION, 1), (SEVERAL, 3)])
def test_the_problem_is_saved_and_loaded(problem, count, tmp_path):
    model = _model(problem, count)
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(tiny_base("bert"), tmp_path)
    assert loaded.adapters["default"].config.heads["own"].problem_type == problem
    labels = NUMBERS if problem == REGRESSION else SETS
    model.requires_grad_(False)
    ours, theirs = (one(**BATCH.inputs, labels=labels) for one in (model, loaded))
    assert_same_bits(ours.loss, theirs.loss)


def test_a_head_of_one_class_is_written_as_before_there_were_others(tmp_path):
    """Folders of earlier versions load as they were, and those that need no later one say nothing new."""
    _model(PROBLEM_TYPES[0], 3).save_pretrained(tmp_path)
    with safe_open(tmp_path / "ptv2_model.safetensors", "pt") as file:
        description = json.loads(file.metadata()["ptv2"])
    head = description["config"]["heads"]["own"]
    assert set(head) == {"task_type", "num_labels", "pooling", "dropout", "labels"}
    assert PTuningV2Config.from_dict(description["config"]).heads["own"].problem_type == PROBLEM_TYPES[0]
    assert _model(SEVERAL, 3).adapters["default"].config.to_dict()["heads"]["own"]["problem_type"] == SEVERAL


@pytest.mark.parametrize(
    ("problem", "count", "function"),
    [(PROBLEM_TYPES[0], 3, lambda x: x.softmax(-1)), (REGRESSION, 1, lambda x: x), (SEVERAL, 3, torch.sigmoid)],
)
def test_a_pipeline_reads_what_the_head_solves(problem, count, function):
    from tiny_folders import WORDS, tiny_tokenizer

    heads = {"own": HeadConfig("SEQ_CLS", count, problem_type=problem)}
    base = tiny_base("bert", vocab_size=len(WORDS))
    model = get_ptv2_model(base, tiny_prompts("deep", "SEQ_CLS", heads=heads)).eval()
    tokenizer = tiny_tokenizer()
    found = TextClassificationPipeline(model=model, tokenizer=tokenizer)("a good film", top_k=None)
    with torch.no_grad():
        logits = model(**tokenizer("a good film", return_tensors="pt")).logits[0]
    assert sorted(one["score"] for one in found) == pytest.approx(sorted(function(logits).tolist()), abs=1e-5)
    if problem != PROBLEM_TYPES[0]:
        assert model.config.to_dict()["problem_type"] == problem
        model.config.problem_type = problem
        other = REGRESSION if problem == SEVERAL else SEVERAL
        with pytest.raises(ValueError, match=f"problem_type must stay what .* made for, '{problem}'.*; got '{other}'"):
            model.config.problem_type = other
    assert model.base_model.config.problem_type is None
    assert model.adapters["default"].heads["own"].linear.in_features == HIDDEN
