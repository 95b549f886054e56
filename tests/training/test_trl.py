"""trl's own trainers on a wrapped model: their losses are those of the model with its prompts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import log_softmax

from benchmarks.stand_in import captured_on_cpu
from ptv2_fast import PTuningV2Model, StepOptions, get_ptv2_model
from ptv2_fast.step.capture import WARM_UP_STEPS
from tiny_folders import WORDS, tiny_tokenizer
from tiny_models import tiny_base, tiny_prompts

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
# trl passes transformers a name that it announces to drop.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

COMMON = {
    "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 3e-2, "logging_steps": 1, "save_strategy": "no",
    "report_to": [], "use_cpu": True, "max_length": 16, "bf16": False, "disable_tqdm": True,
}  # fmt: skip
TEXTS = {"text": ["the film was good", "anna likes the river in paris"] * 6}
PAIRS = {
    "prompt": ["the film was", "anna likes"] * 6,
    "chosen": [" good", " paris"] * 6,
    "rejected": [" bad", " the river"] * 6,
}


def model_of(injection: str = "prefix", folder=None) -> PTuningV2Model:
    base = tiny_base("llama", "CAUSAL_LM", vocab_size=len(WORDS))
    if folder is not None:  # where DPOTrainer loads its reference from
        base.save_pretrained(folder)
        base.config._name_or_path = str(folder)
    torch.manual_seed(0)
    return get_ptv2_model(base, tiny_prompts(injection, "CAUSAL_LM"))


def sft(cls, model: PTuningV2Model, folder, **arguments):
    settings = trl.SFTConfig(str(folder), eos_token="[END]", pad_token="[PAD]", **COMMON, **arguments)
    rows = datasets.Dataset.from_dict(TEXTS)
    return cls(model=model, args=settings, train_dataset=rows, processing_class=tiny_tokenizer(causal=True))


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("injection", ["deep", "shallow", "prefix"])
def test_sft_trainer_has_the_losses_of_the_models_own_forward(injection, tmp_path):
    from ptv2_fast.training.sft import SFTTrainer

    model = model_of(injection)
    found = losses_of(sft(trl.SFTTrainer, model, tmp_path / "a"))
    expected = losses_of(sft(SFTTrainer, model_of(injection), tmp_path / "b"))
    assert found == pytest.approx(expected, rel=1e-4) and found[-1] < found[0]
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids, labels=ids).loss > 0, "the model's own forward goes on"


def test_our_sft_trainer_replays_captured_passes(tmp_path):
    from ptv2_fast.training.sft import SFTTrainer

    found = []
    for captures in (True, False):
        model = model_of()
        model.step_options = StepOptions(labelled_rows_loss=True, cuda_graphs=captures)
        with captured_on_cpu() as counts:
            found.append(losses_of(sft(SFTTrainer, model, tmp_path / str(captures), gradient_checkpointing=False)))
        assert counts.replays == (COMMON["max_steps"] - WARM_UP_STEPS) * captures
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "trl's"])
def test_label_smoothing_compares_the_next_token(ours, tmp_path):
    from ptv2_fast.training.sft import SFTTrainer

    trainer = sft(SFTTrainer if ours else trl.SFTTrainer, model_of(), tmp_path, label_smoothing_factor=0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"][:, 1:]
    logits = model_of()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    log_probs = -log_softmax(logits[labels != -100], -1)
    nll = log_probs.gather(-1, labels[labels != -100][:, None])[:, 0]
    expected = float((0.9 * nll + 0.1 * log_probs.mean(-1)).mean())
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=(labels != -100).sum())
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("injection", ["deep", "shallow"])
def test_dpo_trainer_compares_the_prompted_model_with_the_bare_one(injection, tmp_path):
    model = model_of(injection, tmp_path / "base")
    tokenizer = tiny_tokenizer(causal=True)
    tokenizer.eos_token, tokenizer.pad_token = "[END]", "[PAD]"
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(str(tmp_path / "run"), **COMMON),
        train_dataset=datasets.Dataset.from_dict(PAIRS),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = {"prompted": model_of(injection), "bare": tiny_base("llama", "CAUSAL_LM", vocab_size=len(WORDS))}
    sums = {}
    for name, one in expected.items():
        with torch.no_grad():
            logits = one.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        chosen = log_softmax(logits, -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        sums[name] = (chosen * batch["completion_mask"][:, 1:]).sum(1)
    good, bad = (sums["prompted"] - sums["bare"]).chunk(2)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    by_hand = -torch.nn.functional.logsigmoid(trainer.args.beta * (good - bad)).mean()
    assert loss.item() == pytest.approx(float(by_hand), rel=1e-4)
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "trl's"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_follows_padding_in_front_counts_nowhere(ours, smoothing, tmp_path):
    from ptv2_fast.training.batches import PredictableLabels
    from ptv2_fast.training.sft import SFTTrainer

    ids = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 0, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    trainer = sft(SFTTrainer if ours else trl.SFTTrainer, model_of(), tmp_path, label_smoothing_factor=smoothing)
    assert isinstance(trainer.data_collator, PredictableLabels) == ours
    given = PredictableLabels(lambda features: batch)([])
    count = (given["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(trainer.model, given, num_items_in_batch=count)
    with torch.no_grad():
        logits = torch.cat([model_of()(input_ids=row).logits[0, :-1] for row in (ids[:1], ids[1:, 3:])])
    log_probs = -log_softmax(logits, -1)
    nll = log_probs.gather(-1, torch.cat([ids[0, 1:], ids[1, 4:]])[:, None])[:, 0]
    expected = float(((1 - smoothing) * nll + smoothing * log_probs.mean(-1)).mean())
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_forward_of_the_users_own_gets_the_wrapped_model():
    model = model_of()
    original, seen = model.forward, []

    def forward(self, *args, **kwargs):
        seen.append(self)
        return original(*args, **kwargs)

    model.forward = forward.__get__(model)
    model(input_ids=torch.tensor([[5, 6]]))
    assert seen == [model]
