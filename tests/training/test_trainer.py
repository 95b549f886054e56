"""transformers' own Trainer and pipelines on a wrapped model, as a user would call them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments, pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.trainer_utils import get_last_checkpoint

from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.saving.checkpoint import DESCRIPTION_KEY
from ptv2_fast.training.data import LabelSet
from ptv2_fast.training.predict import evaluate, predict
from ptv2_fast.training.task_data import TaskCodec
from tiny_folders import tiny_bert, tiny_llama, tiny_tokenizer, toy_examples
from tolerances import assert_same_bits

TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM")
INJECTIONS = ("deep", "prefix", "shallow")
LABELS = {"QUESTION_ANS": ["start_positions", "end_positions"]}


def codec_of(task_type: str) -> TaskCodec:
    labels = None
    if task_type in ("SEQ_CLS", "TOKEN_CLS"):
        labels = LabelSet.from_examples(toy_examples(task_type, 64))
    tokenizer = tiny_tokenizer(causal=task_type == "CAUSAL_LM")
    return TaskCodec(task_type, tokenizer, labels, max_length=32, doc_stride=8)


def model_of(task_type: str, injection: str = "deep", **config) -> PTuningV2Model:
    heads = None
    if task_type != "CAUSAL_LM":
        labels = codec_of(task_type).labels
        names = labels.names if labels is not None else ("start", "end")
        heads = {"task": HeadConfig(task_type, len(names), pooling="mean", labels=names)}
    base = tiny_llama() if task_type == "CAUSAL_LM" else tiny_bert()
    torch.manual_seed(0)
    settings = {"num_virtual_tokens": 4, "injection": injection, "heads": heads, **config}
    return get_ptv2_model(base, PTuningV2Config(task_type, **settings))


def trainer_of(model, task_type: str, folder, callbacks=(), rows: int = 64, **arguments) -> Trainer:
    codec = codec_of(task_type)
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-2,
        "save_strategy": "epoch",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **settings),
        train_dataset=codec.encode(toy_examples(task_type, rows)),
        eval_dataset=codec.encode(toy_examples(task_type, 32, seed=1)),
        data_collator=codec.collator,
        callbacks=list(callbacks),
    )


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_parameters(left, right) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert_same_bits(left[name], right[name], name)


class StopAfter(TrainerCallback):
    """Ends a run as a kill would, right after the checkpoint of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("task_type", TASKS)
def test_labels_are_found_and_the_loss_falls(task_type, tmp_path):
    model = model_of(task_type)
    trainer = trainer_of(model, task_type, tmp_path, num_train_epochs=4)
    assert trainer.label_names == LABELS.get(task_type, ["labels"])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.8 * before, (before, after)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_checkpoints_hold_the_adapter_and_nothing_of_the_base(injection, tmp_path):
    model = model_of("SEQ_CLS", injection)
    trainer_of(model, "SEQ_CLS", tmp_path, num_train_epochs=1).train()
    folder = get_last_checkpoint(str(tmp_path))
    saved = load_file(f"{folder}/model.safetensors")
    expected = {f"adapters.default.{name}" for name in model.adapters["default"].state_dict()}
    assert set(saved) == expected | {DESCRIPTION_KEY}
    base_size = sum(p.numel() for p in model.base_model.parameters())
    assert sum(t.numel() for name, t in saved.items() if name != DESCRIPTION_KEY) < base_size / 4
    optimizer = torch.load(f"{folder}/optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(trained(model)), "the optimizer follows what trains and nothing else"


def test_a_checkpoint_of_trainer_loads_as_an_adapter(tmp_path):
    model = model_of("TOKEN_CLS")
    trainer_of(model, "TOKEN_CLS", tmp_path, num_train_epochs=1).train()
    loaded = PTuningV2Model.from_pretrained(tiny_bert(), get_last_checkpoint(str(tmp_path)))
    codec = codec_of("TOKEN_CLS")
    batch = codec.collator(codec.encode(toy_examples("TOKEN_CLS", 5, seed=2)))
    assert_same_bits(loaded(**batch).logits, model.eval().requires_grad_(False)(**batch).logits)


@pytest.mark.parametrize(
    ("injection", "stop", "extra"),
    [
        pytest.param("deep", 4, {}, id="deep-after-an-epoch"),
        pytest.param("deep", 2, {}, id="deep-within-an-epoch"),
        pytest.param("prefix", 4, {"reparameterization": 8}, id="prefix-mlp"),
        pytest.param("shallow", 4, {}, id="shallow"),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(injection, stop, extra, tmp_path):
    settings = {"prompt_dropout": 0.1, **extra}
    straight = model_of("SEQ_CLS", injection, **settings)
    trainer_of(straight, "SEQ_CLS", tmp_path / "a").train()
    killed = model_of("SEQ_CLS", injection, **settings)
    trainer_of(killed, "SEQ_CLS", tmp_path / "b", [StopAfter(stop)]).train()
    checkpoint = get_last_checkpoint(str(tmp_path / "b"))
    assert checkpoint.endswith(f"checkpoint-{stop}")
    resumed = model_of("SEQ_CLS", injection, **settings)
    trainer_of(resumed, "SEQ_CLS", tmp_path / "b").train(resume_from_checkpoint=checkpoint)
    assert_same_parameters(trained(straight), trained(resumed))
    changed = [name for name, p in trained(killed).items() if not torch.equal(p, trained(straight)[name])]
    assert changed, "the part after the kill must matter"


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = model_of("SEQ_CLS")
    trainer = trainer_of(
        model, "SEQ_CLS", tmp_path, num_train_epochs=4, eval_strategy="epoch", load_best_model_at_end=True
    )
    trainer.train()
    by_epoch = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert len(by_epoch) == 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(by_epoch), rel=1e-6)
    saved = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert_same_parameters(trained(model), {name: saved[name] for name in trained(model)})


@pytest.mark.parametrize("injection", INJECTIONS)
def test_evaluation_between_steps_sees_todays_prompts(injection, tmp_path):
    # Trainer's default optimizer writes to parameters in a way that their version counters do not show.
    model = model_of("SEQ_CLS", injection)
    trainer = trainer_of(model, "SEQ_CLS", tmp_path, num_train_epochs=3, eval_strategy="epoch")
    trainer.train()
    last = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record][-1]
    again = model_of("SEQ_CLS", injection)
    again.load_state_dict(model.state_dict())
    codec = codec_of("SEQ_CLS")
    truth = evaluate(again, codec, toy_examples("SEQ_CLS", 32, seed=1))["loss"]
    assert last == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_accumulated_batches_train_like_one_batch(task_type, tmp_path):
    models = []
    for size, accumulated in ((16, 1), (4, 4)):
        model = model_of(task_type)
        arguments = {
            "num_train_epochs": 1,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulated,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
        }
        trainer_of(model, task_type, tmp_path / str(size), rows=32, learning_rate=1.0, **arguments).train()
        models.append(trained(model))
    start = trained(model_of(task_type))
    for name, whole in models[0].items():
        moved = whole - start[name]
        tolerance = 1e-5 * float(moved.abs().max())
        torch.testing.assert_close(models[1][name] - start[name], moved, rtol=1e-3, atol=tolerance)


def test_pipeline_text_classification():
    model = model_of("SEQ_CLS").eval()
    results = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer())(["good film", "bad film"])
    inputs = tiny_tokenizer()(["good film", "bad film"], return_tensors="pt")
    best = model(**inputs).logits.softmax(-1).max(-1)
    assert [r["label"] for r in results] == [("negative", "positive")[i] for i in best.indices]
    assert [r["score"] for r in results] == pytest.approx(best.values.tolist(), rel=1e-5)


def test_pipeline_token_classification():
    model = model_of("TOKEN_CLS").eval()
    names = set(codec_of("TOKEN_CLS").labels.names)
    tagger = pipeline("token-classification", model=model, tokenizer=tiny_tokenizer(), ignore_labels=[])
    found = tagger("anna saw paris")
    assert [entity["word"] for entity in found] == ["anna", "saw", "paris"]
    assert {entity["entity"] for entity in found} <= names
    logits = model(**tiny_tokenizer()("anna saw paris", return_tensors="pt")).logits[0, 1:-1]
    expected = [codec_of("TOKEN_CLS").labels.names[i] for i in logits.argmax(-1)]
    assert [entity["entity"] for entity in found] == expected


@pytest.fixture(scope="module")
def answering(tmp_path_factory) -> PTuningV2Model:
    """A model that has learned to answer the toy questions."""
    model = model_of("QUESTION_ANS")
    folder = tmp_path_factory.mktemp("answering")
    trainer_of(model, "QUESTION_ANS", folder, num_train_epochs=8, per_device_train_batch_size=8).train()
    return model.eval()


def test_question_answering_finds_the_answers(answering):
    asked = toy_examples("QUESTION_ANS", 16, seed=1)
    found = [prediction.value for prediction in predict(answering, codec_of("QUESTION_ANS"), asked)]
    right = sum(answer == e["answers"]["text"][0] for answer, e in zip(found, asked, strict=True))
    assert right >= 10, found


def test_pipeline_question_answering(answering):
    if "question-answering" not in PIPELINE_REGISTRY.get_supported_tasks():
        pytest.skip("this transformers has no question-answering pipeline; ours is tested above")
    asked = toy_examples("QUESTION_ANS", 16, seed=1)
    answerer = pipeline("question-answering", model=answering, tokenizer=tiny_tokenizer())
    found = [answerer(question=e["question"], context=e["context"])["answer"].strip() for e in asked]
    ours = [prediction.value for prediction in predict(answering, codec_of("QUESTION_ANS"), asked)]
    assert found == ours


def test_pipeline_text_generation():
    model = model_of("CAUSAL_LM").eval()
    tokenizer = tiny_tokenizer(causal=True)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    found = writer("anna likes", **options)[0]["generated_text"]
    inputs = tokenizer("anna likes", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert found == tokenizer.decode(expected[0, 2:], skip_special_tokens=True)
    with model.disable_adapter():
        bare = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert not torch.equal(bare, expected), "the prompt must matter"


def test_the_history_is_written_as_json(tmp_path):
    trainer_of(model_of("SEQ_CLS"), "SEQ_CLS", tmp_path, num_train_epochs=1, logging_steps=1).train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [record["step"] for record in state["log_history"] if "loss" in record] == [1, 2, 3, 4]
