"""`ptv2_fast.training.Trainer`: with nothing said, prompts learn, from rows that nobody padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, EvalPrediction, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.training import Trainer, TrainingArguments
from ptv2_fast.training.array_metrics import metric_of, problem_of
from ptv2_fast.training.data import LabelSet
from ptv2_fast.training.row_collator import Filling, RowCollator
from ptv2_fast.training.task_data import TaskCodec
from tiny_folders import tiny_bert, tiny_llama, tiny_tokenizer, toy_examples

QUIET = {"report_to": [], "disable_tqdm": True}


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


@pytest.mark.filterwarnings("error:'pin_memory' argument")
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
    assert trainer.args.load_best_model_at_end and trainer.args.metric_for_best_model == "a_f1"
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
    with pytest.raises(ValueError, match="train_dataset must be one data set; got several: train, test"):
        Trainer(model=model, args=args, train_dataset={"train": rows, "test": rows})
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
    # A data set of texts often says their class too, and may be padded already.
    padded = {"input_ids": [7, 8, 0], "attention_mask": [1, 1, 0], "label": 1}
    assert collate([padded])["labels"].tolist() == [[7, 8, -100]]


def test_rows_come_as_data_sets_write_them():
    model, _, rows, _ = parts_of("TOKEN_CLS")
    collate = RowCollator.of(model)
    expected = collate(rows[:1])
    batch = [{name: [value] for name, value in rows[0].items()}]  # as return_tensors makes them
    for found in (collate([{**rows[0], "label": 1}]), collate(batch)):
        assert {name: tensor.tolist() for name, tensor in found.items()} == {
            name: tensor.tolist() for name, tensor in expected.items()
        }
    with pytest.raises(ValueError, match="rows must be mappings .*; got tuple"):
        collate([([5], 1)])
    with pytest.raises(ValueError, match=r"'label' must be numbers, not names .*; got \['O'\]"):
        collate([{"input_ids": [5], "label": ["O"]}])
    states = collate([{"inputs_embeds": np.ones((n, 4)), "labels": [1] * n} for n in (2, 1)])
    assert set(states) == {"inputs_embeds", "attention_mask", "labels"}
    assert states["inputs_embeds"].sum(dim=-1).tolist() == [[4, 4], [4, 0]]


@pytest.mark.parametrize(
    ("outputs", "problem", "labels", "expected"),
    [
        (1, "regression", [2, 3], [2.0, 3.0]),
        (2, "multi_label_classification", [[0, 1], [1, 1]], [[0.0, 1.0], [1.0, 1.0]]),
        (1, None, [2, 3], [2.0, 3.0]),
        (3, None, [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]], [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]),
        (3, None, [2, 0], [2, 0]),
    ],
)
def test_labels_and_scores_are_of_what_the_head_solves(outputs, problem, labels, expected):
    """A base's own head without a word is taken as its loss takes it: one output, or lists of fractions."""
    config = PTuningV2Config("SEQ_CLS", num_virtual_tokens=2)
    if problem is None:
        own = tiny_bert().config
        own.num_labels = outputs
        model = get_ptv2_model(BertForSequenceClassification(own), config)
    else:
        heads = {"task": HeadConfig("SEQ_CLS", outputs, problem_type=problem)}
        model = get_ptv2_model(tiny_bert(), PTuningV2Config("SEQ_CLS", num_virtual_tokens=2, heads=heads))
    rows = [{"input_ids": [2, 7, 3], "labels": label} for label in labels]
    solved = problem_of(model, rows[0])
    batch = RowCollator.of(model, None, solved)(rows)
    assert batch["labels"].tolist() == expected
    assert batch["labels"].is_floating_point() == isinstance(np.asarray(expected).flat[0].item(), float)
    assert torch.isfinite(model(**batch).loss)
    scores = metric_of(model, solved).compute(
        EvalPrediction(predictions=np.eye(3)[:2, :outputs], label_ids=np.array(expected))
    )
    assert metric_of(model, solved).name in scores


def test_a_head_of_ours_is_not_taken_for_what_its_base_solves():
    base = tiny_bert()
    base.config.problem_type = "multi_label_classification"
    config = PTuningV2Config("SEQ_CLS", num_virtual_tokens=2, heads={"task": 2})
    model = get_ptv2_model(base, config)
    assert model.config.problem_type == "single_label_classification"
    assert metric_of(model).name == "accuracy"
    assert base.config.problem_type == "multi_label_classification"


def test_labels_of_another_text_are_padded_by_themselves():
    from ptv2_fast.training.batches import PadCollator

    collate = RowCollator(PadCollator(Filling(0), padding_side="right"), gives_text=True, own_labels=True)
    batch = collate([{"input_ids": [5], "labels": [7, 8, 9]}, {"input_ids": [5, 6], "label_ids": [4]}])
    assert batch["labels"].tolist() == [[7, 8, 9], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_spans_are_scored_by_the_tokens_that_they_share():
    metric = metric_of(parts_of("QUESTION_ANS")[0])
    ends = [np.eye(8)[[2, 5, 3, 1]], np.eye(8)[[4, 4, 3, 1]]]  # 2 to 4, none, 3 to 3; a row without a label
    truth = [np.array([2, 3, 3, -100]), np.array([5, 4, 3, -100])]
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


def test_scores_are_of_rows_that_have_labels():
    metric = metric_of(parts_of("SEQ_CLS")[0])
    logits, truth = np.eye(2)[[0, 1, 0]], np.array([0, 0, -100])
    assert metric.compute(EvalPrediction(predictions=logits, label_ids=truth))["accuracy"] == 0.5
    for task_type, guess, ignored in (
        ("SEQ_CLS", logits, np.full(3, -100)),
        ("TOKEN_CLS", np.zeros((3, 2)), np.full((3, 2), -100)),
        ("QUESTION_ANS", (logits, logits), (np.full(3, -100), np.full(3, -100))),
    ):
        metric = metric_of(parts_of(task_type)[0])
        assert metric.compute(EvalPrediction(predictions=guess, label_ids=ignored)) == {}, task_type


def test_answers_are_scored_alike_in_batches_of_any_size(tmp_path):
    model, tokenizer, _, dev = parts_of("QUESTION_ANS")
    scores = []
    for size in (1, 32):
        args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=size, **QUIET)
        scores.append(Trainer(model=model, args=args, eval_dataset=dev, processing_class=tokenizer).evaluate())
    assert scores[0]["eval_f1"] == scores[1]["eval_f1"] > 0


@pytest.mark.parametrize(
    ("given", "several", "expected"),
    [
        ({}, True, ("epoch", "epoch", True, "a_pearson", True)),
        ({"load_best_model_at_end": True}, False, ("epoch", "epoch", True, "pearson", True)),
        ({"load_best_model_at_end": True, "save_strategy": "steps"}, False, ("steps", "steps", True, "pearson", True)),
        ({"eval_strategy": "no"}, False, ("no", "epoch", False, None, None)),
        ({"metric_for_best_model": "mse"}, False, ("epoch", "epoch", True, "mse", False)),
        ({"metric_for_best_model": "eval_b_mse"}, True, ("epoch", "epoch", True, "eval_b_mse", False)),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, False, ("epoch", "epoch", True, "pearson", True)),
    ],
)
def test_the_best_epoch_is_found_whatever_is_given(given, several, expected, tmp_path):
    heads = {"task": HeadConfig("SEQ_CLS", 1, problem_type="regression")}
    model = get_ptv2_model(tiny_bert(), PTuningV2Config("SEQ_CLS", num_virtual_tokens=2, heads=heads))
    dev = [{"input_ids": [2, 7, 3], "labels": 1.0}]
    args = TrainingArguments(str(tmp_path), **given, **QUIET)
    trainer = Trainer(model=model, args=args, train_dataset=dev, eval_dataset={"a": dev, "b": dev} if several else dev)
    found = trainer.args
    best = (found.load_best_model_at_end, found.metric_for_best_model, found.greater_is_better)
    assert (found.eval_strategy, found.save_strategy, *best) == expected
    if "lr_scheduler_type" in given:
        assert found.lr_scheduler_kwargs == {"mode": "max"}


def test_arguments_are_set_later_and_read_from_a_command_line(tmp_path):
    model = get_ptv2_model(tiny_bert(), PTuningV2Config("SEQ_CLS", num_virtual_tokens=2, heads={"task": 2}))
    dev = [{"input_ids": [2, 7, 3], "labels": 1}]
    args = TrainingArguments(str(tmp_path), **QUIET)
    args.set_evaluate("steps", steps=3)
    args.metric_for_best_model = "f1"
    found = Trainer(model=model, args=args, train_dataset=dev, eval_dataset=dev).args
    assert (found.eval_strategy, found.save_strategy, found.eval_steps) == ("steps", "steps", 3)
    assert (found.load_best_model_at_end, found.metric_for_best_model, found.greater_is_better) == (False, "f1", True)
    words = f"--output_dir {tmp_path} --eval_strategy steps --load_best_model_at_end True"
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words.split())
    assert (parsed.eval_strategy, parsed.save_strategy, parsed.load_best_model_at_end) == ("steps", "steps", True)


def test_the_best_of_several_sets_and_of_models_that_trainer_makes(tmp_path):
    _, tokenizer, train, dev = parts_of("SEQ_CLS")
    args = TrainingArguments(str(tmp_path), max_steps=1, **QUIET)
    trainer = Trainer(
        model_init=lambda: parts_of("SEQ_CLS")[0], args=args, train_dataset=train[:8],
        eval_dataset={"a": dev[:8], "b": dev[8:]}, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert {"eval_a_accuracy", "eval_b_accuracy"} <= set().union(*trainer.state.log_history)
    assert trainer.state.best_metric is not None


def test_streams_that_know_their_length_are_read(tmp_path):
    model, _, train, _ = parts_of("SEQ_CLS")

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(train[:8])

        def __len__(self):
            return 8

    args = TrainingArguments(str(tmp_path), max_steps=1, **QUIET)
    assert Trainer(model=model, args=args, train_dataset=Stream()).train().global_step == 1


def test_whoever_chooses_another_adapter_trains_that_one(tmp_path):
    model, _, train, _ = parts_of("SEQ_CLS")
    config = PTuningV2Config("SEQ_CLS", num_virtual_tokens=2, heads={"task": 2})
    model.add_adapter("two", config)
    args = TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", **QUIET)
    first = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    trainer = Trainer(model=model, args=args, train_dataset=train[:8])
    trainer.train()
    model.set_adapter("two")
    before = model.adapters["two"].encoder.prompts.detach().clone()
    trainer.train()
    assert not torch.equal(before, model.adapters["two"].encoder.prompts)
    with pytest.raises(ValueError, match=r"optimizers\[0\] must have parameters that train; got frozen ones"):
        Trainer(model=model, args=args, train_dataset=train[:8], optimizers=(first, None)).train()
    model.add_adapter("tags", PTuningV2Config("TOKEN_CLS", num_virtual_tokens=2, heads={"task": 3}))
    model.set_adapter("tags")
    with pytest.raises(ValueError, match="the active adapter must be for SEQ_CLS, as when .*; got TOKEN_CLS"):
        trainer.train()


def test_predictions_come_also_of_tasks_without_scores(tmp_path):
    model, tokenizer, _, dev = parts_of("CAUSAL_LM")
    args = TrainingArguments(str(tmp_path), **QUIET)
    trainer = Trainer(model=model, args=args, eval_dataset=dev[:2], processing_class=tokenizer)
    assert trainer.predict(dev[:2]).predictions is not None


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
    logits = EvalPrediction(predictions=np.eye(3)[np.clip(found.predictions, 0, 2)], label_ids=found.label_ids)
    assert metric.compute(logits) == metric.compute(found), "also of logits that somebody kept"
