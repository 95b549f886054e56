"""What Trainer's arguments ask for happens on a wrapped model: losses by hand, generation, compilation."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from torch.nn.functional import log_softmax
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments, pipeline

from ptv2_fast import get_ptv2_model
from ptv2_fast.training.batches import PredictableLabels
from ptv2_fast.training.runs import load_trained
from tiny_folders import WORDS, tiny_tokenizer
from tiny_models import LABELS, tiny_base, tiny_model, tiny_prompts
from tiny_seq2seq import T5_SERVED
from tiny_seq2seq import tiny_model as tiny_seq2seq

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 11, 12, 13, 14]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
LABELS_OF = IDS.masked_fill(MASK == 0, -100)
SMOOTHING = 0.1


def trainer_of(model, rows: list[dict], folder, **arguments) -> Trainer:
    settings = {
        "max_steps": 1, "per_device_train_batch_size": len(rows), "per_device_eval_batch_size": len(rows),
        "learning_rate": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, **arguments,
    }  # fmt: skip
    data: torch.utils.data.Dataset = rows  # type: ignore[assignment]
    return Trainer(model=model, args=TrainingArguments(str(folder), **settings), train_dataset=data, eval_dataset=data)


def rows_of(**columns: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def train_loss(trainer: Trainer) -> float:
    trainer.train()
    return next(record["loss"] for record in trainer.state.log_history if "loss" in record)


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean over labels other than -100 of (1 - e) nll + e mean over classes."""
    logits, labels = logits[labels != -100], labels[labels != -100]
    log_probs = -log_softmax(logits.double(), -1)
    nll = log_probs.gather(-1, labels[:, None])[:, 0]
    return float(((1 - SMOOTHING) * nll + SMOOTHING * log_probs.mean(-1)).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_label_smoothing_of_a_causal_model_compares_the_next_token(family, tmp_path):
    model = tiny_model(family, "deep", "CAUSAL_LM")
    ids = IDS[:, 2:]
    rows = rows_of(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    trainer = trainer_of(model, rows, tmp_path, label_smoothing_factor=SMOOTHING)
    with torch.no_grad():
        expected = smoothed(model.eval()(input_ids=ids).logits[:, :-1], ids[:, 1:])
    assert train_loss(trainer) == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("heads", [None, {"task": LABELS}], ids=["base-head", "own-head"])
def test_label_smoothing_of_a_classifier_compares_the_row_or_token_itself(task_type, heads, tmp_path):
    model = tiny_model("bert", "deep", task_type, **({} if heads is None else {"heads": heads}))
    labels = torch.tensor([0, 2]) if task_type == "SEQ_CLS" else (IDS % LABELS).masked_fill(MASK == 0, -100)
    trainer = trainer_of(
        model, rows_of(input_ids=IDS, attention_mask=MASK, labels=labels), tmp_path, label_smoothing_factor=SMOOTHING
    )
    with torch.no_grad():
        expected = smoothed(model.eval()(input_ids=IDS, attention_mask=MASK).logits, labels)
    assert train_loss(trainer) == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(not T5_SERVED, reason="this transformers' T5 has an attention of its own")
def test_label_smoothing_of_an_encoder_decoder_compares_the_token_itself(tmp_path):
    model = tiny_seq2seq("t5")
    targets = IDS.flip(0)[:, 2:]
    start = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=2)
    rows = rows_of(input_ids=IDS, attention_mask=MASK, decoder_input_ids=start, labels=targets)
    trainer = trainer_of(model, rows, tmp_path, label_smoothing_factor=SMOOTHING)
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS, attention_mask=MASK, decoder_input_ids=start).logits
    assert train_loss(trainer) == pytest.approx(smoothed(logits, targets), rel=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_label_smoothing_of_an_encoder_decoder_needs_what_its_decoder_reads(kind, tmp_path):
    """BART would derive it from the text, and train on that; the collator that knows the model makes it of labels."""
    model = tiny_seq2seq(kind)
    rows = rows_of(input_ids=IDS, attention_mask=MASK, labels=IDS)
    trainer = trainer_of(model, rows, tmp_path, label_smoothing_factor=SMOOTHING)
    with pytest.raises(ValueError, match="labels or decoder_input_ids must be given in training; .*DataCollatorForSeq"):
        trainer.train()
    trainer.data_collator = transformers.DataCollatorForSeq2Seq(tiny_tokenizer(), model=model)
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS, attention_mask=MASK, labels=IDS).logits
    assert train_loss(trainer) == pytest.approx(smoothed(logits, IDS), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_a_mean_over_the_tokens_that_are_predicted(family, side, tmp_path):
    """Trainer counts the first label of a row with padding in front, which nothing predicts."""
    model = tiny_model(family, "deep", "CAUSAL_LM")
    ids, mask, labels = IDS, MASK, LABELS_OF
    if side == "right":
        ids, mask, labels = (torch.cat([x[:1], x[1:].roll(-2, 1)]) for x in (ids, mask, labels))
    alone = [IDS[:1], IDS[1:, 2:]]
    with torch.no_grad():
        losses = [float(model.eval()(input_ids=row, labels=row).loss) * (row.shape[1] - 1) for row in alone]
    expected = sum(losses) / sum(row.shape[1] - 1 for row in alone)
    trainer = trainer_of(model, rows_of(input_ids=ids, attention_mask=mask, labels=labels), tmp_path)
    assert train_loss(trainer) == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_accumulated_batches_with_padding_in_front_weigh_a_mean(tmp_path):
    """Two batches alike are one batch, whatever was counted for each."""
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    rows = rows_of(input_ids=IDS, attention_mask=MASK, labels=LABELS_OF)
    whole = train_loss(trainer_of(model, rows, tmp_path / "a"))
    halves = trainer_of(
        model,
        rows * 2,
        tmp_path / "b",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    assert train_loss(halves) == pytest.approx(whole, rel=1e-4)


UNEVEN = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15], [6, 5, 4, 3, 7]]


def left_padded(features: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(feature["input_ids"]) for feature in features)
    rows = [[0] * (width - len(feature["input_ids"])) + feature["input_ids"] for feature in features]
    ids = torch.tensor(rows)
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
def test_batches_of_rows_with_padding_in_front_weigh_by_the_labels_that_are_predicted(smoothing, tmp_path):
    """Trainer counts labels before the model sees them: what nothing predicts is taken out by the collator."""
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    trainer = trainer_of(
        model,
        [{"input_ids": ids} for ids in UNEVEN],
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        label_smoothing_factor=smoothing,
    )
    trainer.data_collator = PredictableLabels(left_padded)
    rows = [torch.tensor([ids]) for ids in UNEVEN]
    with torch.no_grad():
        model.eval()
        logits = torch.cat([model(input_ids=ids).logits[0, :-1] for ids in rows])
    labels = torch.cat([ids[0, 1:] for ids in rows])
    nll = float(torch.nn.functional.cross_entropy(logits.double(), labels))
    expected = smoothed(logits, labels) if smoothing else nll
    assert train_loss(trainer) == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.skipif(not T5_SERVED, reason="this transformers' T5 has an attention of its own")
def test_the_generation_config_of_seq2seq_arguments_is_used(tmp_path):
    model = tiny_seq2seq("t5")
    chosen = transformers.GenerationConfig(
        max_new_tokens=3, min_new_tokens=3, decoder_start_token_id=2, pad_token_id=1, eos_token_id=0
    )
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        generation_config=chosen,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = rows_of(input_ids=IDS, attention_mask=MASK, labels=IDS)
    trainer = Seq2SeqTrainer(model=model, args=arguments)
    predicted = trainer.predict(rows).predictions  # type: ignore[arg-type]
    assert model.base_model.generation_config.max_new_tokens == 3
    assert (predicted[:, 4:] == 1).all() and (predicted[:, 3] != 1).any(), predicted


@pytest.mark.parametrize(("family", "task_type"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM")])
def test_a_compiled_step_is_one_graph_for_all_steps(family, task_type, tmp_path):
    """Nothing of a fresh wrapper breaks the graph, and no step of the same shape compiles again."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(family, "deep", task_type, base_changes={"num_hidden_layers": 1})
    labels = torch.tensor([0, 1]) if task_type == "SEQ_CLS" else IDS
    rows = rows_of(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels)
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
    try:
        trainer_of(model, rows, tmp_path, **settings).train()
    finally:
        torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], dict(counters["graph_break"])
    # transformers' classifiers note what kind of problem they have in their first call.
    assert counters["stats"]["unique_graphs"] <= 2, dict(counters["stats"])


@pytest.mark.parametrize(
    ("kind", "family", "task_type"),
    [
        ("text-classification", "bert", "SEQ_CLS"),
        ("token-classification", "bert", "TOKEN_CLS"),
        ("feature-extraction", "bert", "FEATURE_EXTRACTION"),
        ("text-generation", "llama", "CAUSAL_LM"),
    ],
)
def test_a_pipeline_does_not_say_that_the_model_is_not_supported(kind, family, task_type, caplog, monkeypatch):
    base = tiny_base(family, task_type, vocab_size=len(WORDS))
    model = get_ptv2_model(base, tiny_prompts("deep", task_type)).eval()
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        made = pipeline(kind, model=model, tokenizer=tiny_tokenizer(causal=task_type == "CAUSAL_LM"))
        made("good film")
    assert "not supported" not in caplog.text


def test_a_pipeline_for_another_task_is_still_told(caplog, monkeypatch):
    base = tiny_base("bert", "TOKEN_CLS", vocab_size=len(WORDS))
    model = get_ptv2_model(base, tiny_prompts("deep", "TOKEN_CLS")).eval()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.ERROR, logger="transformers"):
        pipeline("text-classification", model=model, tokenizer=tiny_tokenizer())
    assert "not supported" in caplog.text


@pytest.mark.skipif(not T5_SERVED, reason="this transformers' T5 has an attention of its own")
def test_the_command_line_says_who_serves_an_encoder_decoder(tmp_path):
    tiny_seq2seq("t5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SEQ_2_SEQ_LM, which the command line .* its generate writes"):
        load_trained(tmp_path, model="any")
