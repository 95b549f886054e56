"""A training process that is killed outright, and what another one makes of its last checkpoint."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import other_rounding
from processes import forkserver
from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.training.data import LabelSet
from ptv2_fast.training.task_data import TaskCodec
from tiny_folders import tiny_bert, tiny_llama, tiny_tokenizer, toy_examples

STEPS, SAVED, KILLED_IN = 8, 4, 6


class KillIn(TrainerCallback):
    """Ends the process in the middle of a step: gradients are there, the optimizer has not moved."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)


class Steps(TrainerCallback):
    """Which steps this process runs."""

    def __init__(self):
        self.run: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.run.append(state.global_step)


def _trainer(task_type: str, injection: str, folder, callbacks=()) -> Trainer:
    codec = TaskCodec(
        task_type,
        tiny_tokenizer(causal=task_type == "CAUSAL_LM"),
        LabelSet.from_examples(toy_examples(task_type, 64)) if task_type == "SEQ_CLS" else None,
        max_length=32,
        doc_stride=8,
    )
    heads = None
    if task_type == "SEQ_CLS":
        heads = {"task": HeadConfig(task_type, 2, pooling="mean", labels=codec.labels.names)}
    base = tiny_bert() if task_type == "SEQ_CLS" else tiny_llama()
    torch.manual_seed(0)
    config = PTuningV2Config(task_type, num_virtual_tokens=4, injection=injection, prompt_dropout=0.1, heads=heads)
    # Shuffled rows, accumulated batches, warm-up and dropout: what has to be taken up again is more than the prompts.
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        warmup_steps=3,
        learning_rate=3e-2,
        save_steps=SAVED,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    return Trainer(
        model=get_ptv2_model(base, config),
        args=arguments,
        train_dataset=codec.encode(toy_examples(task_type, 64)),
        data_collator=codec.collator,
        callbacks=list(callbacks),
    )


def _train_until_killed(task_type: str, injection: str, folder: str) -> None:
    torch.set_num_threads(1)
    other_rounding.install_if_asked()
    _trainer(task_type, injection, folder, [KillIn()]).train()


def _outcome(trainer: Trainer) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    losses = {record["step"]: record["loss"] for record in trainer.state.log_history if "loss" in record}
    return losses, {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("task_type", "injection"), [("SEQ_CLS", "deep"), ("CAUSAL_LM", "prefix")])
def test_a_killed_process_resumes_to_the_same_bits(task_type, injection, tmp_path):
    child = forkserver().Process(target=_train_until_killed, args=(task_type, injection, str(tmp_path / "killed")))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    checkpoint = get_last_checkpoint(str(tmp_path / "killed"))
    assert checkpoint.endswith(f"checkpoint-{SAVED}")

    straight = _trainer(task_type, injection, tmp_path / "straight")
    straight.train()
    steps = Steps()
    resumed = _trainer(task_type, injection, tmp_path / "killed", [steps])
    resumed.train(resume_from_checkpoint=True)
    assert steps.run == list(range(SAVED + 1, STEPS + 1))
    (losses, ends), (resumed_losses, resumed_ends) = _outcome(straight), _outcome(resumed)
    assert list(losses) == list(range(1, STEPS + 1)) == list(resumed_losses)
    assert losses == resumed_losses
    assert ends.keys() == resumed_ends.keys()
    for name, end in ends.items():
        assert torch.equal(end, resumed_ends[name]), name
