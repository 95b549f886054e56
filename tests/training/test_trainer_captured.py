"""transformers' Trainer over a model whose forward is captured: the run of eager passes, to the last bit."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.stand_in import captured_on_cpu
from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, StepOptions, get_ptv2_model
from ptv2_fast.step import forward_passes
from ptv2_fast.training.data import LabelSet
from ptv2_fast.training.task_data import TaskCodec
from tiny_folders import tiny_bert, tiny_llama, tiny_tokenizer, toy_examples
from tolerances import assert_same_bits

STEPS = 8


def _codec(task_type: str) -> TaskCodec:
    labels = LabelSet.from_examples(toy_examples(task_type, 64)) if task_type in ("SEQ_CLS", "TOKEN_CLS") else None
    return TaskCodec(task_type, tiny_tokenizer(causal=task_type == "CAUSAL_LM"), labels, max_length=32, doc_stride=8)


def _model(task_type: str) -> PTuningV2Model:
    labels = _codec(task_type).labels
    heads = None if labels is None else {"task": HeadConfig(task_type, len(labels.names), labels=labels.names)}
    heads = {"task": HeadConfig(task_type, 2)} if task_type == "QUESTION_ANS" else heads
    base = tiny_llama() if heads is None else tiny_bert()
    torch.manual_seed(0)
    config = PTuningV2Config(task_type, num_virtual_tokens=4, heads=heads, prompt_dropout=0.1)
    # As on CUDA.
    return get_ptv2_model(base, config, step_options=StepOptions(labelled_rows_loss=True))


class _StopAfter(TrainerCallback):
    """Ends a run right after the checkpoint of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def _run(task_type: str, folder, callbacks=(), resume: str | None = None, **arguments):
    """The losses that were logged, and what trains at the end."""
    codec, model = _codec(task_type), _model(task_type)
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 3e-2,
        "max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2, "logging_steps": 1, "eval_steps": 3,
        "eval_strategy": "steps", "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "remove_unused_columns": False, **arguments,
    }  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(folder), **settings),
        train_dataset=codec.encode(toy_examples(task_type, 64)),
        eval_dataset=codec.encode(toy_examples(task_type, 8, seed=1)),
        data_collator=codec.collator,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = {(r["step"], name): r[name] for r in trainer.state.log_history for name in r if name.endswith("loss")}
    norms = {(r["step"], "norm"): r["grad_norm"] for r in trainer.state.log_history if "grad_norm" in r}
    return {**losses, **norms}, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def _eager_passes():
    """Every pass is an eager one, of the same packed batch."""
    with pytest.MonkeyPatch.context() as patch, captured_on_cpu() as counts:
        patch.setattr(forward_passes, "WARM_UP_STEPS", 10**9)
        yield
    assert counts.captures == 0 and counts.warm_ups > 0


def _assert_same_runs(found, expected) -> None:
    assert found[0] == expected[0]
    for name, value in expected[1].items():
        assert_same_bits(found[1][name], value, name)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM"])
def test_a_captured_run_is_the_run_of_eager_passes(task_type, tmp_path):
    with captured_on_cpu() as counts:
        found = _run(task_type, tmp_path / "a")
    assert counts.captures > 0 and counts.replays > STEPS
    with _eager_passes():
        expected = _run(task_type, tmp_path / "b")
    _assert_same_runs(found, expected)
    plain, _ = _run(task_type, tmp_path / "c")
    assert found[0].keys() == plain.keys()
    for name, value in plain.items():
        assert found[0][name] == pytest.approx(value, rel=1e-3), name


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    with captured_on_cpu() as counts:
        straight = _run("SEQ_CLS", tmp_path / "a")
        _run("SEQ_CLS", tmp_path / "b", [_StopAfter(4)])
        checkpoint = get_last_checkpoint(str(tmp_path / "b"))
        resumed = _run("SEQ_CLS", tmp_path / "b", resume=checkpoint)
    assert counts.replays > 2 * STEPS
    for name, value in straight[1].items():
        assert_same_bits(resumed[1][name], value, name)


def test_label_smoothing_and_a_loss_function_compute_their_own(tmp_path):
    """They take the labels away, so the forward is none of a training step."""
    with captured_on_cpu() as counts:
        found = _run("SEQ_CLS", tmp_path / "a", label_smoothing_factor=0.1)
    assert counts.warm_ups == 0
    _assert_same_runs(found, _run("SEQ_CLS", tmp_path / "b", label_smoothing_factor=0.1))
