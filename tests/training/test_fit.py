"""fit: it learns, stops, restores the best epoch, resumes exactly, and gives the model back as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.training.checkpoints import last_whole
from ptv2_fast.training.data import LabelSet
from ptv2_fast.training.fit import FitSettings, fit
from ptv2_fast.training.predict import evaluate, predict
from ptv2_fast.training.task_data import TaskCodec, starting_texts
from tiny_folders import tiny_bert, tiny_llama, tiny_tokenizer, toy_examples

LABELLED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def task(task_type: str, rows: int = 96, dropout: float = 0.0):
    """(model, codec, train, dev) of a toy task."""
    train, dev = toy_examples(task_type, rows), toy_examples(task_type, 32, seed=1)
    labels = LabelSet.from_examples(train) if task_type in LABELLED[:2] else None
    codec = TaskCodec(task_type, tiny_tokenizer(causal=task_type == "CAUSAL_LM"), labels, max_length=32, doc_stride=8)
    if task_type == "CAUSAL_LM":
        base, heads = tiny_llama(), None
    else:
        names = labels.names if labels is not None else ("start", "end")
        base = tiny_bert()
        heads = {"task": HeadConfig(task_type, len(names), pooling="mean", labels=names)}
    torch.manual_seed(0)
    config = PTuningV2Config(task_type, num_virtual_tokens=4, prompt_dropout=dropout, heads=heads)
    return get_ptv2_model(base, config), codec, train, dev


def trained_state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def short(**changes) -> FitSettings:
    return FitSettings(**{"learning_rate": 3e-2, "epochs": 2, "batch_size": 16, **changes})


def all_equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class StopAfter(TrainerCallback):
    """Ends training as a kill would, once an epoch's checkpoint stands."""

    def __init__(self, epochs: int):
        self.epochs = epochs

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = round(state.epoch) >= self.epochs


@pytest.mark.parametrize("task_type", LABELLED)
def test_learns_a_toy_task(task_type, tmp_path):
    model, codec, train, dev = task(task_type)
    frozen = {name: p.clone() for name, p in model.base_model.named_parameters()}
    before = evaluate(model, codec, dev)
    result = fit(model, codec, train, dev, settings=short(epochs=8, batch_size=8), checkpoints=tmp_path, title=None)
    after = evaluate(model, codec, dev)
    assert after["loss"] < 0.7 * before["loss"], (before, after)
    assert after[result.metric] > before[result.metric] + 0.2, (before, after)
    losses = [record["loss"] for record in result.history if "loss" in record]
    assert losses[-1] < 0.7 * losses[0], losses
    assert all_equal(frozen, dict(model.base_model.named_parameters())), "the base changed"
    assert result.tokens_per_second > result.rows_per_second > 0
    assert result.dev_rows >= len(dev) and result.rows >= len(train)


def test_a_language_model_prompt_lowers_perplexity(tmp_path):
    model, codec, train, dev = task("CAUSAL_LM")
    before = evaluate(model, codec, dev)["perplexity"]
    result = fit(model, codec, train, dev, settings=short(epochs=4), checkpoints=tmp_path, title=None)
    after = evaluate(model, codec, dev)["perplexity"]
    assert after < 0.8 * before
    assert result.metric == "perplexity" and result.scores["perplexity"] == pytest.approx(after, rel=1e-5)
    best = min(record["eval_perplexity"] for record in result.history if "eval_perplexity" in record)
    assert result.scores["perplexity"] == best, "smaller is better"


def test_the_best_epoch_is_restored(tmp_path):
    model, codec, train, dev = task("SEQ_CLS")
    result = fit(model, codec, train, dev, settings=short(epochs=5), checkpoints=tmp_path, title=None)
    by_epoch = [record["eval_accuracy"] for record in result.history if "eval_accuracy" in record]
    assert len(by_epoch) == 5
    assert result.best_epoch == 1 + by_epoch.index(max(by_epoch))
    scores = evaluate(model, codec, dev, batch_size=16)
    assert scores["accuracy"] == result.scores["accuracy"] == max(by_epoch)
    assert scores["loss"] == pytest.approx(result.scores["loss"], rel=1e-5)


def test_the_last_epoch_is_kept_where_it_is_asked_for(tmp_path):
    # A rate at which the toy task is learnt and lost again, so that the last epoch is not the best.
    settings = short(epochs=4, learning_rate=0.3, schedule="exponential", decay=1.0, restore_best=False)
    model, codec, train, dev = task("SEQ_CLS")
    result = fit(model, codec, train, dev, settings=settings, checkpoints=tmp_path, title=None)
    losses = [record["eval_loss"] for record in result.history if "eval_loss" in record]
    assert result.best_epoch == 4 and result.scores["loss"] == losses[-1]
    assert len(set(losses)) == 4
    assert evaluate(model, codec, dev, batch_size=16)["loss"] == pytest.approx(losses[-1], rel=1e-5)
    with pytest.raises(ValueError, match="restore_best must be True with early_stopping"):
        short(early_stopping=1, restore_best=False)


def test_early_stopping_ends_a_run_that_does_not_get_better(tmp_path):
    model, codec, train, dev = task("SEQ_CLS", rows=32)
    settings = short(learning_rate=1e-9, epochs=9, early_stopping=2)
    result = fit(model, codec, train, dev, settings=settings, checkpoints=tmp_path, title=None)
    assert result.epochs == 3 and result.best_epoch == 1


def test_early_stopping_without_dev_rows_is_refused(tmp_path):
    model, codec, train, _ = task("SEQ_CLS", rows=8)
    with pytest.raises(ValueError, match="early_stopping needs dev rows"):
        fit(model, codec, train, settings=short(early_stopping=1), checkpoints=tmp_path / "c", title=None)
    assert not (tmp_path / "c").exists()


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    straight, codec, train, _ = task("SEQ_CLS", dropout=0.2)
    # Without dev the last weights stay, which is what must be the same; dropout draws random numbers on the way.
    options = {"settings": short(epochs=3), "title": None}
    fit(straight, codec, train, checkpoints=tmp_path / "a", **options)
    killed = task("SEQ_CLS", dropout=0.2)[0]
    fit(killed, codec, train, checkpoints=tmp_path / "b", callbacks=[StopAfter(1)], **options)
    resumed = task("SEQ_CLS", dropout=0.2)[0]
    result = fit(resumed, codec, train, checkpoints=tmp_path / "b", resume=True, **options)
    assert result.epochs == 3
    newest = [last_whole(tmp_path / name) for name in "ab"]
    states = [torch.load(f"{path}/optimizer.pt", weights_only=True)["state"] for path in newest]
    for index, state in states[0].items():
        assert torch.equal(state["exp_avg"], states[1][index]["exp_avg"]), "the optimizer went another way"
    assert all_equal(trained_state(straight), trained_state(resumed))
    assert not all_equal(trained_state(straight), trained_state(killed)), "an epoch must change the weights"


def test_resume_passes_over_a_checkpoint_that_was_cut_off(tmp_path):
    model, codec, train, dev = task("SEQ_CLS", rows=32)
    fit(model, codec, train, dev, settings=short(), checkpoints=tmp_path, title=None)
    whole = last_whole(tmp_path)
    cut = tmp_path / "checkpoint-9000"
    shutil.copytree(whole, cut)
    (cut / "trainer_state.json").unlink()
    assert last_whole(tmp_path) == whole
    (cut / "trainer_state.json").write_text('{"epoch": 1,')
    assert last_whole(tmp_path) == whole
    assert last_whole(tmp_path / "absent") is None


def test_resume_passes_over_a_checkpoint_whose_weights_were_damaged(tmp_path):
    """A flipped bit, which safetensors itself reads as another number."""
    model, codec, train, dev = task("SEQ_CLS", rows=32)
    fit(model, codec, train, dev, settings=short(epochs=2), checkpoints=tmp_path, title=None)
    newest = Path(last_whole(tmp_path))
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 0x40
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: its checksum is not that of what it holds"):
        PTuningV2Model.from_pretrained(model.base_model, newest)
    assert last_whole(tmp_path) not in (None, str(newest))
    assert load_file(Path(last_whole(tmp_path)) / "model.safetensors").keys() == load_file(weights).keys()


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_the_rate_falls_as_the_schedule_says(schedule, tmp_path):
    model, codec, train, _ = task("SEQ_CLS", rows=32)
    settings = short(epochs=3, batch_size=16, schedule=schedule, decay=0.5)
    history = fit(model, codec, train, settings=settings, checkpoints=tmp_path, title=None).history
    rates = [record["learning_rate"] / 3e-2 for record in history if "learning_rate" in record]
    expected = [1, 1, 0.5, 0.5, 0.25, 0.25] if schedule == "exponential" else [k / 6 for k in (6, 5, 4, 3, 2, 1)]
    assert rates == pytest.approx(expected)


def test_the_seed_decides_the_run(tmp_path):
    states = []
    for seed in (1, 1, 2):
        model, codec, train, _ = task("SEQ_CLS", rows=48)
        fit(model, codec, train, settings=short(seed=seed), checkpoints=tmp_path / str(len(states)), title=None)
        states.append(trained_state(model))
    assert all_equal(states[0], states[1])
    assert not all_equal(states[0], states[2])


def test_bf16_trains_float32_weights_and_leaves_the_model_in_float32(tmp_path):
    model, codec, train, dev = task("SEQ_CLS")
    result = fit(model, codec, train, dev, settings=short(bf16=True), checkpoints=tmp_path, title=None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batch = codec.collator(codec.encode(dev[:2]))
    seen = []
    handle = model.backbone.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state.dtype))
    model(**batch)
    handle.remove()
    assert seen == [torch.float32], "autocast must end with training"
    losses = [record["loss"] for record in result.history if "loss" in record]
    assert losses[-1] < losses[0]


def test_without_dev_the_last_epoch_stays(tmp_path):
    model, codec, train, _ = task("TOKEN_CLS", rows=32)
    result = fit(model, codec, train, settings=short(), checkpoints=tmp_path, title=None)
    assert result.best_epoch == 2 and result.scores == {}
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch_size": True},
        {"gradient_accumulation": -1},
        {"early_stopping": 0},
        {"schedule": "cosine"},
        {"decay": 2.0},
        {"warmup": -0.1},
        {"weight_decay": -1.0},
        {"max_grad_norm": 0.0},
        {"seed": -1},
        {"seed": 2**32},
        {"learning_rate": float("inf")},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        FitSettings(**change)


def test_predictions_do_not_depend_on_the_batch():
    model, codec, _, dev = task("SEQ_CLS")
    alone = [predict(model, codec, [example], batch_size=1)[0] for example in dev[:7]]
    together = predict(model, codec, dev[:7], batch_size=4)
    assert [p.value for p in alone] == [p.value for p in together]
    assert [p.score for p in alone] == pytest.approx([p.score for p in together], rel=1e-5)
    assert model.training, "predicting must leave the mode as it was"


def test_the_evaluated_loss_is_the_mean_over_labels():
    model, codec, _, dev = task("TOKEN_CLS")
    small, large = (evaluate(model, codec, dev, batch_size=size)["loss"] for size in (3, 32))
    assert small == pytest.approx(large, rel=1e-5)


def test_evaluating_without_labels_is_refused():
    model, codec, _, _ = task("SEQ_CLS")
    with pytest.raises(ValueError, match="label"):
        evaluate(model, codec, [{"text": "good film"}])


def test_starting_texts_take_classes_in_turn():
    rows = [{"text": f"p{i}", "label": "p"} for i in range(5)] + [{"text": "n0", "label": "n"}]
    assert starting_texts(rows, 4) == ["p0", "n0", "p1", "p2"]
    assert starting_texts([{"tokens": ["a", "b"], "tags": ["O", "O"]}], 3) == ["a b"]
    assert starting_texts([{"question": "q", "context": "c"}], 3) == ["q c"]


def test_log_history_is_plain_json(tmp_path):
    model, codec, train, dev = task("SEQ_CLS", rows=16)
    result = fit(model, codec, train, dev, settings=short(epochs=1), checkpoints=tmp_path, title=None)
    assert json.loads(json.dumps(list(result.history))) == list(result.history)
