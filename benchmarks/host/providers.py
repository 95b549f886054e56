"""Who takes part in a cell of the suite `host`: calls that are ready to be timed and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.host.cases import PROMPT, TASKS, TOKENS, HostCase
from benchmarks.step.batches import Batch, make_batch
from benchmarks.step.forms import head_of, plain_form, task_loss
from benchmarks.step.models import build_base, twin
from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.step.options import StepOptions

Call = Callable[[], Any]
# What they are on CUDA through the triton backend, while training and not.
CUDA_DEFAULTS = StepOptions(unpad=True, labelled_rows_loss=True, fused_projections=True, last_rows=True)
CUDA_EVALUATION = StepOptions(unpad=False, labelled_rows_loss=False, fused_projections=False, last_rows=False)
# Tokens of a generation that is timed against one of a single token.
NEW_TOKENS = 8


def calls_of(case: HostCase) -> dict[str, Call]:
    """Provider -> what is called again and again."""
    torch.manual_seed(0)
    if case.kind == "launch":
        return _launches(case)
    base = build_base(case.model, torch.device("cpu"), torch.float32, layers=case.layers)
    batch = make_batch(base, _lengths(case), causal=base.config.model_type == "llama", width=TOKENS)
    if case.kind == "tasks":
        return _tasks(case, base, batch)
    if case.kind == "cpu-eval":
        return _evaluations(case, base.eval(), batch)
    if case.kind == "token":
        return _generations(case, base.eval(), batch)
    return {"ours": _our_step(case, base, batch), "peft": _peft_step(base, batch), "bare": _bare_step(base, batch)}


def _lengths(case: HostCase) -> list[int]:
    """Real tokens of each row; the first row is full."""
    padded = round(case.padding * case.rows * TOKENS / max(1, case.rows - 1))
    return [TOKENS, *[TOKENS - padded] * (case.rows - 1)]


# Steps


def our_model(case: HostCase, base: nn.Module) -> nn.Module:
    """Our model over a twin of the base: the triton backend and the defaults on CUDA asked for, or what a CPU has."""
    own = case.on_cpu
    prompts = {"num_virtual_tokens": PROMPT, "injection": case.injection, "backend": "torch" if own else "triton"}
    causal = base.get_output_embeddings() is not None
    if causal:
        config = PTuningV2Config("CAUSAL_LM", **prompts)
    elif case.kind == "tasks":
        config = PTuningV2Config("FEATURE_EXTRACTION", **prompts)
    else:
        config = PTuningV2Config("SEQ_CLS", heads={"task": HeadConfig("SEQ_CLS", 2)}, **prompts)
    options = StepOptions() if own else CUDA_EVALUATION if case.kind == "token" else CUDA_DEFAULTS
    model = get_ptv2_model(twin(base), config, step_options=options)
    for number in range(1, TASKS if case.kind == "tasks" else 1):
        model.add_adapter(f"task{number}", config)
    model.adapters.requires_grad_(False)
    for adapter in model.adapters.values():
        adapter.encoder.requires_grad_(True)
    return model.train()


def _our_step(case: HostCase, base: nn.Module, batch: Batch) -> Call:
    model = our_model(case, base)

    def loss() -> Tensor:
        return model(batch.input_ids, batch.attention_mask, labels=batch.labels).loss

    return _stepping(loss, model)


def _tasks(case: HostCase, base: nn.Module, batch: Batch) -> dict[str, Call]:
    model, head = our_model(case, base), head_of(base)
    names = list(model.adapters)
    several = [names[row % len(names)] for row in range(case.rows)]

    def step(rows: list[str] | None) -> Call:
        def loss() -> Tensor:
            if head is None:
                return model(batch.input_ids, batch.attention_mask, labels=batch.labels, adapter_names=rows).loss
            output = model(batch.input_ids, batch.attention_mask, adapter_names=rows)
            return task_loss(base, output.last_hidden_state, batch.labels, head)

        return _stepping(loss, model)

    return {"ours": step(None), f"ours_tasks{TASKS}": step(several)}


def _bare_step(base: nn.Module, batch: Batch) -> Call:
    bound = plain_form(base)
    embeddings, mask, labels = bound.prepare(batch)

    def step() -> None:
        embeddings.grad = None
        bound.forward(embeddings, mask, labels).backward()

    return step


def _peft_model(base: nn.Module, task: str) -> nn.Module:
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(twin(base), PrefixTuningConfig(task_type=task, num_virtual_tokens=PROMPT))


def _peft_step(base: nn.Module, batch: Batch) -> Call:
    head = head_of(base)
    model = _peft_model(base, "CAUSAL_LM" if head is None else "FEATURE_EXTRACTION").train()

    def loss() -> Tensor:
        if head is None:
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return task_loss(base, output.last_hidden_state, batch.labels, head)

    return _stepping(loss, model)


def _stepping(loss: Call, model: nn.Module) -> Call:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        loss().backward()

    return step


# Evaluation


def _evaluations(case: HostCase, base: nn.Module, batch: Batch) -> dict[str, Call]:
    head = head_of(base)
    peft = _peft_model(base, "CAUSAL_LM" if head is None else "FEATURE_EXTRACTION")

    def evaluating(model: nn.Module, has_head: bool) -> Call:
        model.eval()

        @torch.no_grad()
        def call() -> Tensor:
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            return output.logits if has_head else F.linear(output.last_hidden_state[:, 0].float(), head)

        return call

    others = {"peft": peft, "bare": twin(base)}
    own = {"ours": evaluating(our_model(case, base), has_head=True)}
    return own | {name: evaluating(model, head is None) for name, model in others.items()}


# Generation


def _generations(case: HostCase, base: nn.Module, batch: Batch) -> dict[str, Call]:
    base.generation_config.eos_token_id = None
    models = {"ours": our_model(case, base), "peft": _peft_model(base, "CAUSAL_LM"), "bare": twin(base)}
    calls = {}
    for name, model in models.items():
        for count in (1, 1 + NEW_TOKENS):
            calls[f"{name}/{count}"] = _generating(model.eval(), batch, count)
    return calls


def _generating(model: nn.Module, batch: Batch, count: int) -> Call:
    settings = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return lambda: model.generate(**inputs, **settings)


# Launches


def _launches(case: HostCase) -> dict[str, Call]:
    """Attention of one layer as every eager call launches it and, unrepeated, by the kernels' own host functions; and a
    kernel of three arguments to compare with."""
    import triton
    import triton.language as tl

    from ptv2_fast.attention.triton_backend import launch_backward, launch_forward
    from ptv2_fast.kernels.prompt_backward import Needs, prompt_attention_backward
    from ptv2_fast.kernels.prompt_forward import prompt_attention_forward

    globals()["tl"] = tl  # a kernel finds its language among the globals of its module

    @triton.jit
    def plain(x_ptr, y_ptr, size):
        tl.store(y_ptr, tl.load(x_ptr) * size)

    x, y = torch.zeros(64), torch.zeros(64)
    q, k, v = (torch.zeros(case.rows, 4, TOKENS, 32) for _ in range(3))
    prompt_k, prompt_v = (torch.zeros(1, 4, PROMPT, 32) for _ in range(2))
    inputs = (q, k, v, prompt_k, prompt_v)
    o, lse = prompt_attention_forward(*inputs)
    grad = torch.zeros_like(o)
    needs = Needs(query=True, text=True, prompt=True, prompt_bias=False, bias=False)
    # No tensor beside them; no limit, causality, window, cap or dropout.
    rest = (*(None,) * 6, None, False, None, None, 32**-0.5, 0.0)
    asked = (*(True,) * 5, False, False)
    ours = {
        "forward": (
            lambda: launch_forward(*inputs, None, *rest),
            lambda: prompt_attention_forward(*inputs),
        ),
        "backward": (
            lambda: launch_backward(grad, *inputs, None, o, lse, asked, *rest),
            lambda: prompt_attention_backward(grad, *inputs, o, lse, needs=needs),
        ),
    }
    repeated, alone = ours[case.injection]
    return {"ours": repeated, "ours_unrepeated": alone, "plain": lambda: plain[(1,)](x, y, 64)}
