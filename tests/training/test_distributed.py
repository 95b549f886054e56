"""Two processes: DDP, Trainer's DDP, and FSDP2 on the frozen base, against one process that has everything."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from processes import WORLD, in_two_processes
from ptv2_fast import GraphRunner, PTuningV2Model, StepOptions, get_ptv2_model
from ptv2_fast.families.registry import family_of
from ptv2_fast.saving.export import prompt_tensors
from tiny_models import tiny_base, tiny_model, tiny_prompts
from tolerances import assert_equal, assert_same_bits, relative_error

ALL_ON = StepOptions(**{field.name: True for field in fields(StepOptions) if field.name != "float8"})
# family, injection, task, gradient checkpointing
CASES = {
    "bert tags": ("bert", "deep", "TOKEN_CLS", False),
    "bert rows": ("bert", "deep", "SEQ_CLS", False),
    "bert states": ("bert", "deep", "FEATURE_EXTRACTION", False),
    "bert evolving tags": ("bert", "shallow", "TOKEN_CLS", False),
    "distilbert rows": ("distilbert", "deep", "SEQ_CLS", False),
    "albert states": ("albert", "deep", "FEATURE_EXTRACTION", False),
    "modernbert tags, checkpointed": ("modernbert", "deep", "TOKEN_CLS", True),
    "deberta tags, checkpointed": ("deberta-v2", "deep", "TOKEN_CLS", True),
    "deberta prefix": ("deberta-v2", "prefix", "TOKEN_CLS", False),
    "mpnet rows": ("mpnet", "deep", "SEQ_CLS", False),
    "gpt2 text": ("gpt2", "deep", "CAUSAL_LM", False),
    "llama text": ("llama", "deep", "CAUSAL_LM", False),
    "llama text, checkpointed": ("llama", "deep", "CAUSAL_LM", True),
    "llama prefix": ("llama", "prefix", "CAUSAL_LM", False),
    "llama shallow": ("llama", "shallow", "CAUSAL_LM", False),
    "gpt2 shallow, checkpointed": ("gpt2", "shallow", "CAUSAL_LM", True),
}


def _batch(task: str, seed: int, rows: int = 2, *, left: bool = True) -> dict[str, torch.Tensor]:
    """Every row has as many labels, so that a mean over halves is the mean over all; the first may be padded left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 30, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    if left:
        mask[0] = mask[0].roll(1)
    labels = {
        "SEQ_CLS": ids[:, 0] % 3,
        "TOKEN_CLS": (ids % 3).masked_fill(mask == 0, -100),
        "CAUSAL_LM": ids.masked_fill(mask == 0, -100),
    }
    batch = {"input_ids": ids, "attention_mask": mask}
    return {**batch, "labels": labels[task]} if task in labels else batch


def _model(family: str, injection: str, task: str) -> PTuningV2Model:
    torch.manual_seed(5)
    return tiny_model(family, injection, task).train()


def _shard(model: PTuningV2Model, root: str, **options) -> None:
    layers = family_of(model.backbone).layers(model.backbone)
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model if root == "model" else model.base_model, **options)
    assert isinstance(layers[0], FSDPModule)


def _results(model: PTuningV2Model, batch: dict[str, torch.Tensor]):
    """Loss, gradients, and what evaluation gives afterwards."""
    output = model(**batch)
    loss = output.loss if "loss" in output else output.last_hidden_state.square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        evaluated = model.eval()(**batch)
    model.train()
    return loss.detach(), grads, evaluated.logits if "logits" in evaluated else evaluated.last_hidden_state


def _same_as_whole(case: str, root: str, rank: int) -> None:
    family, injection, task, checkpointing = CASES[case]
    found = []
    for sharded in (False, True):
        model = _model(family, injection, task)
        if checkpointing:
            model.gradient_checkpointing_enable()
        if sharded:
            model.step_options = ALL_ON
            _shard(model, root)
        found.append(_results(model, _batch(task, rank)))
    (loss, grads, states), (sharded_loss, sharded_grads, sharded_states) = found
    assert_equal(sharded_loss, loss, "loss")
    mask = _batch(task, rank)["attention_mask"].bool()
    real = mask if states.dim() == 3 else slice(None)
    assert_equal(sharded_states[real], states[real], "evaluation")
    assert len(grads) == len(sharded_grads) > 0
    for grad, sharded in zip(grads, sharded_grads, strict=True):
        if root == "model":
            # FSDP2 averages what it shards itself.
            dist.all_reduce(grad)
            grad, sharded = grad / WORLD, sharded.full_tensor()
        assert_equal(sharded, grad, "gradient")


def _shallow_on_a_part(rank: int) -> None:
    model = _model("llama", "shallow", "CAUSAL_LM")
    _shard(model, "base")
    with pytest.raises(ValueError, match="fully_shard must be given the whole PTuningV2Model, or the backbone"):
        model(**_batch("CAUSAL_LM", 0))


def _bank(rank: int) -> None:
    names = ["default", "other"]
    found = []
    for sharded in (False, True):
        model = _model("llama", "deep", "CAUSAL_LM")
        model.add_adapter("other", tiny_prompts("prefix", "CAUSAL_LM", length=3))
        model.adapters.requires_grad_(True)
        if sharded:
            _shard(model, "base")
        loss = model(**_batch("CAUSAL_LM", rank), adapter_names=names).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.adapters.parameters())])
    for whole, sharded in zip(*found, strict=True):
        assert_equal(sharded, whole)


def _lower_precision(rank: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for injection in ("deep", "prefix"):
        whole, sharded = (_model("llama", injection, "CAUSAL_LM") for _ in range(2))
        _shard(sharded, "base", mp_policy=policy)
        expected, found = (m(**_batch("CAUSAL_LM", rank)) for m in (whole, sharded))
        assert found.logits.dtype == torch.bfloat16
        assert 1e-5 < relative_error(found.logits, expected.logits) < 4e-2
        found.loss.backward()
        assert sharded.adapters["default"].encoder.prompts.grad.isfinite().all()


def _text_and_files(root: str, rank: int) -> None:
    whole, sharded = (_model("llama", "deep", "CAUSAL_LM").eval() for _ in range(2))
    _shard(sharded, root)
    ids = _batch("CAUSAL_LM", 0)["input_ids"]
    if root == "model":
        with pytest.raises(ValueError, match=r"prompts must be whole; .*register_fsdp_forward_method"):
            sharded.generate(input_ids=ids, max_new_tokens=5)
        register_fsdp_forward_method(sharded, "generate")
    texts = [m.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for m in (whole, sharded)]
    assert torch.equal(*texts)
    with tempfile.TemporaryDirectory() as folder:
        sharded.save_pretrained(folder, is_main_process=rank == 0)
        assert len(list(Path(folder).iterdir())) == (2 if rank == 0 else 0)
        sharded.save_pretrained(folder)
        loaded = PTuningV2Model.from_pretrained(tiny_base("llama", "CAUSAL_LM"), folder)
    assert_same_bits(loaded(input_ids=ids).logits, whole.requires_grad_(False)(input_ids=ids).logits)
    with pytest.raises(ValueError, match="model must have its weights at hand"):
        prompt_tensors(sharded, "kv")
    with pytest.raises(
        ValueError, match=r"its weights come and go \(FSDP2\): load the saved adapter over a whole base"
    ):
        sharded.save_pretrained("nowhere", format="peft")


def _train(run, optimizer, task: str, part: slice, steps: int = 3) -> torch.Tensor:
    losses = []
    for step in range(steps):
        batch = {name: value[part] for name, value in _batch(task, step, rows=4).items()}
        optimizer.zero_grad()
        loss = run(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def _optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def _steps(how: str, case: str, rank: int) -> None:
    """Losses of a few steps, the mean over the processes."""
    family, injection, task, _ = CASES[case]
    whole, model = (_model(family, injection, task) for _ in range(2))
    expected = _train(whole, _optimizer(whole), task, slice(None))
    part = slice(2 * rank, 2 * rank + 2)
    run = model
    if how == "ddp":
        run = DistributedDataParallel(model)
    else:
        _shard(model, "base" if how == "runner" else "model")
    optimizer = _optimizer(model)
    if how == "runner":
        runner = GraphRunner(model, optimizer)
        batches = [{n: value[part] for n, value in _batch(task, step, rows=4).items()} for step in range(3)]
        losses = torch.stack([runner.step(batch) for batch in batches])
    else:
        losses = _train(run, optimizer, task, part)
    dist.all_reduce(losses)
    assert_equal(losses / WORLD, expected, "losses")


class _Rows(torch.utils.data.Dataset):
    def __init__(self, task: str):
        # Trainer counts a label that nothing predicts where padding is left of it, and each process corrects its own
        # share of that count: exact in one process alone.
        self._batch = _batch(task, 0, rows=16, left=False)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {name: value[index] for name, value in self._batch.items()}


def _trainer(case: str, size: int) -> dict[str, torch.Tensor]:
    """What a run of transformers' Trainer leaves."""
    family, injection, task, _ = CASES[case]
    base = tiny_base(family, task)
    torch.manual_seed(5)
    model = get_ptv2_model(base, tiny_prompts(injection, task))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=size,
            num_train_epochs=2,
            learning_rate=0.5,
            optim="sgd",
            report_to=[],
            max_grad_norm=1.0,
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
            logging_steps=1,
            seed=3,
            dataloader_pin_memory=False,
            ddp_backend="gloo" if dist.is_initialized() else None,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=_Rows(task))
        trainer.train()
    losses = torch.tensor([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert trainer.args.world_size * size == 8 and len(losses) == 4
    return {"losses": losses, **{n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}}


def _trainer_in_a_process(case: str, rank: int) -> dict[str, list]:
    return {name: value.tolist() for name, value in _trainer(case, 4).items()}


TRAINED = ("bert rows", "llama text", "gpt2 shallow, checkpointed")
CHECKS = {
    **{f"whole model sharded, {case}": functools.partial(_same_as_whole, case, "model") for case in CASES},
    **{
        f"base sharded, {case}": functools.partial(_same_as_whole, case, "base")
        for case in ("bert rows", "bert states", "bert evolving tags", "llama text, checkpointed", "llama prefix")
    },
    "a shallow prompt on a base that is no root": _shallow_on_a_part,
    "several adapters": _bank,
    "lower precision": _lower_precision,
    **{f"text and files, the {root} sharded": functools.partial(_text_and_files, root) for root in ("base", "model")},
    **{f"steps of ddp, {case}": functools.partial(_steps, "ddp", case) for case in TRAINED},
    **{f"steps of fsdp2, {case}": functools.partial(_steps, "fsdp2", case) for case in TRAINED},
    "steps of the runner, llama text": functools.partial(_steps, "runner", "llama text"),
}
TRAINER_CHECKS = {case: functools.partial(_trainer_in_a_process, case) for case in TRAINED[:2]}


@pytest.fixture(scope="module")
def results():
    return in_two_processes({**CHECKS, **TRAINER_CHECKS})


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_give_what_one_gives(check, results):
    for found in results:
        assert found[check] is None, found[check]


@pytest.mark.parametrize("case", TRAINER_CHECKS)
def test_trainer_in_two_processes_ends_where_it_ends_in_one(case, results):
    expected = _trainer(case, 8)
    for found in results:
        assert isinstance(found[case], dict), found[case]
        assert found[case].keys() == expected.keys()
        for name, value in expected.items():
            assert_equal(torch.tensor(found[case][name]), value, name)
