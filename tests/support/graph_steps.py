"""Models, batches and the plain loop that steps of a graph runner are held to."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from ptv2_fast import HeadConfig
from ptv2_fast.step.graph_runner import GraphRunner
from ptv2_fast.step.options import StepOptions
from ptv2_fast.step.packed import Buckets
from tiny_models import tiny_model
from tolerances import assert_equal

OFF = StepOptions(**{field.name: False for field in fields(StepOptions)})
SMALL = Buckets(tokens=8, rows=2, targets=4)
# The loss of a span reads padding, whose states are zeros where padding is dropped.
OFF_FOR_SPANS = replace(OFF, unpad=True)
# Every batch of these tests is of one size then.
WIDE = Buckets(tokens=32, rows=4, targets=32)
OWN = {"own": 3}
LAST = HeadConfig("SEQ_CLS", 3, pooling="last")
MEAN = HeadConfig("SEQ_CLS", 3, pooling="mean")
NUMBERS = HeadConfig("SEQ_CLS", 2, problem_type="regression")
CASES = {
    "bert tags, base head": ("bert", "deep", "TOKEN_CLS", {}),
    "roberta tags, own head": ("roberta", "prefix", "TOKEN_CLS", {"heads": OWN}),
    "bert rows, first token": ("bert", "deep", "SEQ_CLS", {"heads": OWN}),
    "llama rows, last token": ("llama", "deep", "SEQ_CLS", {"heads": {"own": LAST}}),
    "llama text": ("llama", "deep", "CAUSAL_LM", {}),
    "gpt2 text": ("gpt2", "shallow", "CAUSAL_LM", {}),
    "deberta tags": ("deberta-v2", "deep", "TOKEN_CLS", {}),
    "mpnet rows, first token": ("mpnet", "prefix", "SEQ_CLS", {"heads": OWN}),
    "qwen3 text": ("qwen3", "prefix", "CAUSAL_LM", {}),
    "bert rows, base head": ("bert", "deep", "SEQ_CLS", {}),
    "llama rows, base head": ("llama", "prefix", "SEQ_CLS", {}),
    "roberta rows, mean": ("roberta", "deep", "SEQ_CLS", {"heads": {"own": MEAN}}),
    "bert numbers": ("bert", "deep", "SEQ_CLS", {"heads": {"own": NUMBERS}}),
    "bert spans, base head": ("bert", "deep", "QUESTION_ANS", {}),
    "llama spans, own head": ("llama", "prefix", "QUESTION_ANS", {"heads": {"own": HeadConfig("QUESTION_ANS", 2)}}),
    "bert choices": ("bert", "deep", "MULTIPLE_CHOICE", {"heads": {"own": 1}}),
    "bert vectors": ("bert", "deep", "SENTENCE_RETRIEVAL", {}),
}


def model_of(case, **sizes):
    """The model of a case, the same every time, in training mode; `sizes` of its base's configuration."""
    family, injection, task, config = CASES[case]
    changes = {} if task in ("CAUSAL_LM", "SENTENCE_RETRIEVAL") or config else {"classifier_dropout": 0.0}
    if task == "SEQ_CLS" and not config:
        changes["problem_type"] = "single_label_classification"
    torch.manual_seed(5)
    return tiny_model(family, injection, task, base_changes=changes | sizes, **config).train()


def model_for_kernels(case):
    """The same with heads of 16, which kernels serve: on a card other sizes run packed rows one after the other."""
    return model_of(case, **({"head_dim": 16} if CASES[case][0] == "llama" else {"num_attention_heads": 2}))


def batches_for(case, count=6, seed=0):
    """Batches for the model of a case."""
    _, _, task, config = CASES[case]
    numbers = config.get("heads", {}).get("own") is NUMBERS
    return batches_of("numbers" if numbers else task, count, seed)


def batches_of(task, count=6, seed=0):
    """Batches of different sizes, padded on either side; `task` may be "numbers" too."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 5), (3, 7), (2, 4)]
    batches = []
    for step in range(count):
        rows, tokens = sizes[step % len(sizes)]
        lengths = torch.randint(2, tokens + 1, (rows,), generator=generator)
        mask = (torch.arange(tokens) < lengths[:, None]).long()
        mask = mask if step % 2 else mask.flip(1)
        ids = torch.randint(3, 30, (rows, tokens), generator=generator).masked_fill(mask == 0, 1)
        batch = {"input_ids": ids, "attention_mask": mask}
        if task in ("MULTIPLE_CHOICE", "SENTENCE_RETRIEVAL"):
            batch = {name: torch.stack((value, value.flip(0)), 1) for name, value in batch.items()}
        if task in ("SEQ_CLS", "MULTIPLE_CHOICE"):
            labels = torch.randint(0, 2 if task == "MULTIPLE_CHOICE" else 3, (rows,), generator=generator)
        elif task == "numbers":
            labels = torch.rand(rows, 2, generator=generator)
        elif task == "QUESTION_ANS":
            start, end = torch.randint(0, tokens, (2, rows), generator=generator)
            batches.append({**batch, "start_positions": start, "end_positions": end})
            continue
        elif task == "SENTENCE_RETRIEVAL":
            batches.append(batch)
            continue
        else:
            labels = torch.randint(0, 3, (rows, tokens), generator=generator)
            inside = mask if task == "TOKEN_CLS" else (mask.cumsum(-1) > 1) & (mask == 1)
            labels = labels.masked_fill(inside == 0, -100)
        batches.append({**batch, "labels": labels})
    return batches


def optimizer_of(model):
    """AdamW over what trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def plain_options(case):
    """Switches by which nothing of a step is left out that its loss does not miss."""
    return OFF_FOR_SPANS if CASES[case][2] == "QUESTION_ANS" else OFF


def plain_of(case):
    """The model of a case with nothing of a step left out."""
    model = model_of(case)
    model.step_options = plain_options(case)
    return model


def plain_losses(case, batches, accumulate=1):
    """Losses of a loop with every switch off and nothing packed."""
    model = plain_of(case)
    optimizer = optimizer_of(model)
    groups = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    return torch.stack([plain_step(model, optimizer, group) for group in groups])


def compare_steps(case, steps, *, between=None, make=optimizer_of, accumulate=1, max_grad_norm=None, batches=None):
    """Steps of a graph runner beside the plain loop's: the same losses, and the same gradients left behind.

    Args:
        between: (step, model, optimizer) called before each step of both.
        make: (model) -> optimizer.
        batches: (step) -> batch; one of one size unless given.

    Returns:
        the runner.
    """
    model, plain = model_of(case), model_of(case)
    plain.step_options = OFF
    optimizers = [make(m) for m in (model, plain)]
    runner = GraphRunner(model, optimizers[0], buckets=WIDE, max_grad_norm=max_grad_norm)
    drawn = batches_for(case, count=steps * accumulate)
    for step in range(steps):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            if between is not None:
                between(step, m, optimizer)
            m.train()
        plain.step_options = OFF
        group = drawn[step * accumulate : (step + 1) * accumulate] if batches is None else [batches(step)]
        loss = runner.step(*group)
        expected = plain_step(plain, optimizers[1], group, max_grad_norm)
        assert_equal(loss, expected, f"loss of step {step}")
        for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), (name, step)
            if theirs.grad is not None:
                assert_equal(ours.grad, theirs.grad, f"gradient of {name} in step {step}")
    return runner


def plain_step(model, optimizer, group, max_grad_norm=None):
    """One step of the loop that everybody writes."""
    optimizer.zero_grad()
    total = torch.zeros(())
    for batch in group:
        loss = model(**batch).loss / len(group)
        loss.backward()
        total += loss.detach()
    if max_grad_norm is not None:
        trained = [p for g in optimizer.param_groups for p in g["params"]]
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
    optimizer.step()
    return total
