"""`ptv2_fast.training.Trainer`: with nothing said, prompts learn, from rows that nobody padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import EvalPrediction
from transformers.trainer_utils import get_last_checkpoint

from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.training import Trainer, TrainingArguments
from ptv2_fast.training.array_metrics import metric_of
from ptv2_fast.training.data import LabelSet
from ptv2_fast.training.row_collator import Filling, RowCollator
from ptv2_fast.training.task_data import TaskCodec
from tiny_folders import tiny_bert, tiny_llama, tiny_tokenizer, toy_examples

QUIET = {"report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}


def parts_of(task_type: str):
    """A model, a tokenizer, and rows as a data set has them: of training and held out."""
    causal, tagged = task_type == "CAUSAL_LM", task_type in ("SEQ_CLS", "TOKEN_CLS")
    tokenizer = tiny_tokenizer(causal=causal)
    examples, held_out = toy_examples(task_type, 96), toy_examples(task_type, 32, seed=1)
    labels = LabelSet.from_examples(examples) if tagged else None
    codec = TaskCodec(task_type, tokenizer, labels, max_length=32, doc_stride=8)
    names = labels.names if labels is not None else ("start", "end")
    heads = None if causal else {"task": HeadConfig(task_type, len(names), labels=names)}
    model = get_ptv2_model(
        tiny_llama() if causal else tiny_bert(),
        PTuningV2Config(task_type, num_virtual_tokens=8, heads=heads),
        tokenizer=tokenizer,
        init_text="good bad film",
    )
    return model, tokenizer, codec.encode(examples), codec.encode(held_out)


# What epochs are compared by, what else is scored, and what it must reach.
SCORES = {
    "SEQ_CLS": ("accuracy", {"f1"}, 0.9),
    "TOKEN_CLS": ("f1", {"precision", "recall", "accuracy"}, 0.6),
    "QUESTION_ANS": ("f1", {"exact_match"}, 20.0),
    "CAUSAL_LM": ("loss", set(), None),
}


@pytest.mark.parametrize("task_type", SCORES)
def test_prompts_learn_with_nothing_said(task_type, tmp_path):
    model, tokenizer, train, dev = parts_of(task_type)
    name, others, least = SCORES[task_type]
    if task_type == "CAUSAL_LM":
        train = [{"input_ids": torch.tensor(row["input_ids"])} for row in train]
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=16, **QUIET)
    trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=dev, processing_class=tokenizer)
    trainer.train()
    scored = [record for record in trainer.state.log_history if f"eval_{name}" in record]
    assert len(scored) == 10, "every epoch is scored"
    assert {f"eval_{other}" for other in others} <= set(scored[0])
    best = (min if name == "loss" else max)(record[f"eval_{name}"] for record in scored)
    assert best < 0.7 * scored[0]["eval_loss"] if least is None else best >= least, scored
    assert trainer.evaluate()[f"eval_{name}"] == pytest.approx(best, rel=1e-5), "the best epoch is the model"
    assert get_last_checkpoint(str(tmp_path)) is not None
    assert trainer.args.learning_rate == 1e-2 and args.eval_strategy == "no", "what the caller gave is not written to"


def test_what_is_given_is_taken_as_it_is(tmp_path):
    model, tokenizer, train, dev = parts_of("SEQ_CLS")

    def ours(found):
        return {"mine": 1.0}

    def collate(rows):
        return rows

    steps = TrainingArguments(str(tmp_path), learning_rate=3e-2, eval_strategy="steps", eval_steps=3, **QUIET)
    shared = {"model": model, "train_dataset": train, "processing_class": tokenizer}
    trainer = Trainer(args=steps, eval_dataset=dev, compute_metrics=ours, data_collator=collate, **shared)
    assert (trainer.args.learning_rate, trainer.args.eval_steps) == (3e-2, 3)
    assert (trainer.args.eval_strategy, trainer.args.save_strategy) == ("steps", "steps")
    assert not trainer.args.load_best_model_at_end
    assert trainer.compute_metrics is ours and trainer.data_collator is collate
    chosen = TrainingArguments(str(tmp_path), metric_for_best_model="f1", num_train_epochs=2, **QUIET)
    trainer = Trainer(args=chosen, eval_dataset={"a": dev}, **shared)
    assert trainer.args.load_best_model_at_end and trainer.args.metric_for_best_model == "f1"
    bare = Trainer(args=TrainingArguments(str(tmp_path), **QUIET), **shared)
    assert (bare.args.eval_strategy, bare.args.save_strategy) == ("no", "epoch")
    assert not bare.args.load_best_model_at_end


def test_rows_that_are_no_tokens_are_refused_by_their_columns(tmp_path):
    model = parts_of("SEQ_CLS")[0]
    args = TrainingArguments(str(tmp_path), **QUIET)
    rows = [{"text": "good film", "label": 1}]
    with pytest.raises(
        ValueError, match=r"train_dataset must be tokenized: expected a column 'input_ids'; got text, l"
    ):
        Trainer(model=model, args=args, train_dataset=rows)
    datasets = pytest.importorskip("datasets")
    dev = {"plain": datasets.Dataset.from_list(rows)}
    with pytest.raises(ValueError, match=r"eval_dataset\['plain'\] must be tokenized"):
        Trainer(model=model, args=args, eval_dataset=dev)


def test_rows_are_padded_without_a_tokenizer_as_the_base_says():
    collate = RowCollator.of(parts_of("CAUSAL_LM")[0])
    batch = collate([{"input_ids": np.array([7, 8, 9])}, {"input_ids": [6]}])
    assert batch["input_ids"].tolist() == [[7, 8, 9], [6, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9], [6, -100, -100]]


def test_labels_of_another_text_are_padded_by_themselves():
    from ptv2_fast.training.batches import PadCollator

    collate = RowCollator(PadCollator(Filling(0), padding_side="right"), gives_text=True, own_labels=True)
    batch = collate([{"input_ids": [5], "labels": [7, 8, 9]}, {"input_ids": [5, 6], "label_ids": [4]}])
    assert batch["labels"].tolist() == [[7, 8, 9], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_spans_are_scored_by_the_tokens_that_they_share():
    metric = metric_of(parts_of("QUESTION_ANS")[0])
    ends = [np.eye(8)[[2, 5, 3]], np.eye(8)[[4, 4, 3]]]  # 2 to 4, none, 3 to 3
    truth = [np.array([2, 3, 3]), np.array([5, 4, 3])]
    scores = metric.compute(EvalPrediction(predictions=tuple(ends), label_ids=tuple(truth)))
    assert scores["exact_match"] == pytest.approx(100 / 3)
    assert scores["f1"] == pytest.approx(100 * (2 * 3 / (3 + 4) + 0 + 1) / 3)


@pytest.mark.parametrize(
    ("problem", "logits", "labels", "expected"),
    [
        ("regression", [[1.0], [2.0], [3.0]], [2.0, 4.0, 6.0], {"pearson": 1.0, "mse": 14 / 3}),
        ("multi_label_classification", [[1.0, -1.0], [2.0, 3.0]], [[1.0, 0.0], [0.0, 1.0]], {"micro_f1": 0.8}),
    ],
)
def test_numbers_and_sets_of_labels_have_scores(problem, logits, labels, expected):
    outputs = len(logits[0])
    heads = {"task": HeadConfig("SEQ_CLS", outputs, problem_type=problem)}
    metric = metric_of(get_ptv2_model(tiny_bert(), PTuningV2Config("SEQ_CLS", num_virtual_tokens=2, heads=heads)))
    scores = metric.compute(EvalPrediction(predictions=np.array(logits), label_ids=np.array(labels)))
    assert metric.name == next(iter(expected))
    assert {name: scores[name] for name in expected} == pytest.approx(expected)


def test_choices_and_tags_that_are_no_entities_have_an_accuracy():
    config = PTuningV2Config("MULTIPLE_CHOICE", num_virtual_tokens=2, heads={"task": 1})
    found = EvalPrediction(predictions=np.array([[0.1, 0.9], [0.8, 0.2]]), label_ids=np.array([1, 1]))
    assert metric_of(get_ptv2_model(tiny_bert(), config)).compute(found) == {"accuracy": 0.5}
    config = PTuningV2Config("TOKEN_CLS", num_virtual_tokens=2, heads={"task": 3})
    metric = metric_of(get_ptv2_model(tiny_bert(), config))
    # As Trainer gathers batches of two widths: padded with -100.
    found = EvalPrediction(
        predictions=np.array([[0, 1, -100], [2, 2, 1]]), label_ids=np.array([[0, 1, -100], [2, 0, 1]])
    )
    assert metric.name == "accuracy" and metric.compute(found)["accuracy"] == pytest.approx(4 / 5)
