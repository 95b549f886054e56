"""The training systems that users have, accelerate's loop and trl's SFTTrainer, with nothing of ours around."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast import PTuningV2Model, get_ptv2_model
from tiny_folders import WORDS, tiny_tokenizer
from tiny_models import tiny_base, tiny_model, tiny_prompts
from tolerances import assert_equal


def _batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 30, (count, 2, 6), generator=generator)
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]


def _plain_losses(model) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in _batches():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _model():
    torch.manual_seed(3)
    return tiny_model("llama", "deep", "CAUSAL_LM").train()


def test_accelerate_gives_the_losses_of_the_plain_loop():
    accelerate = pytest.importorskip("accelerate")
    model = _model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(_batches(), batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        optimizer.zero_grad()
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert_equal(torch.tensor(losses), torch.tensor(_plain_losses(_model())), "losses")
    state = accelerator.get_state_dict(model)
    assert not any(name.startswith("base_model") for name in state)


# trl passes transformers a name that it announces to drop.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_trainer_trains_the_prompts_alone_and_saves_them(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    base = tiny_base("llama", "CAUSAL_LM", vocab_size=len(WORDS))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_ptv2_model(base, tiny_prompts("prefix", "CAUSAL_LM"))
    rows = datasets.Dataset.from_dict({"text": ["the film was good", "anna likes the river in paris"] * 8})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=3e-2,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        max_length=16,
        eos_token="[END]",
        pad_token="[PAD]",
        bf16=False,
    )
    from ptv2_fast.training.sft import SFTTrainer

    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer(causal=True)
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), name
    fresh = tiny_base("llama", "CAUSAL_LM", vocab_size=len(WORDS))
    loaded = PTuningV2Model.from_pretrained(fresh, tmp_path / "run" / "checkpoint-6")
    ids = torch.randint(3, 20, (1, 5))
    assert_equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits, "logits")
