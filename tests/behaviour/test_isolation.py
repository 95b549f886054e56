"""Nothing is shared that should not be: threads, wrappers, caches, dtypes and the compiler."""

from __future__ import annotations

import threading

import pytest
import torch

from batches import padded, text_rows
from ptv2_fast import get_ptv2_model
from ptv2_fast.backbone import view
from tiny_models import (
    DECODERS,
    FAMILIES,
    INJECTIONS,
    LABELS,
    MIXTURES,
    tiny_base,
    tiny_model,
    tiny_prompts,
)
from tolerances import assert_differs, assert_equal, assert_same_bits

BATCH = padded(text_rows(), "left")
REAL = BATCH.attention_mask.bool()


def _task_of(family):
    return "CAUSAL_LM" if family in DECODERS else "TOKEN_CLS"


def _labels(task):
    labels = BATCH.input_ids if task == "CAUSAL_LM" else BATCH.input_ids % LABELS
    return labels.masked_fill(~REAL, -100)


def test_two_models_in_two_threads_give_what_they_give_alone():
    kinds = [("bert", "shallow", "TOKEN_CLS"), ("llama", "deep", "CAUSAL_LM")]
    models = [tiny_model(*kind).train() for kind in kinds]
    models[1].gradient_checkpointing_enable()

    def step(model, task):
        model.zero_grad()
        loss = model(**BATCH.inputs, labels=_labels(task)).loss
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.adapters.parameters()]

    alone = [step(model, kind[2]) for model, kind in zip(models, kinds, strict=True)]
    together: list[list] = [[], []]
    barrier = threading.Barrier(2)

    def work(index):
        torch.set_num_threads(1)
        for _ in range(6):
            barrier.wait(timeout=60)
            together[index].append(step(models[index], kinds[index][2]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for index in range(2):
        assert len(together[index]) == 6
        for results in together[index]:
            for actual, expected in zip(results, alone[index], strict=True):
                assert_equal(actual, expected)


@pytest.mark.parametrize("family", ["bert", "llama", "deberta-v2"])
def test_two_wrappers_over_one_base(family):
    base = tiny_base(family)
    first = get_ptv2_model(base, tiny_prompts("deep")).eval()
    before = first(**BATCH.inputs).last_hidden_state
    second = get_ptv2_model(base, tiny_prompts("prefix", length=2)).eval()
    assert_differs(second(**BATCH.inputs).last_hidden_state[REAL], before[REAL])
    assert_same_bits(first(**BATCH.inputs).last_hidden_state, before)
    bare = tiny_base(family).requires_grad_(False)(**BATCH.inputs).last_hidden_state
    with second.disable_adapter():
        assert_same_bits(second(**BATCH.inputs).last_hidden_state, bare)
    assert_same_bits(first(**BATCH.inputs).last_hidden_state, before)


# Prompts' keys and values are made of the parameters as they are.


def _evaluated(model):
    with torch.no_grad():
        return model(**BATCH.inputs).last_hidden_state[REAL]


def _optimizer_step(model):
    model.train()
    model(**BATCH.inputs).last_hidden_state.square().sum().backward()
    torch.optim.SGD(model.adapters.parameters(), lr=0.1).step()
    model.eval()


def _loaded(model):
    state = {n: t + 0.5 if t.is_floating_point() else t for n, t in model.state_dict().items()}
    model.load_state_dict(state)


def _assigned(model):
    encoder = model.adapters["default"].encoder
    encoder.prompts = torch.nn.Parameter(encoder.prompts.detach() + 0.5)


def _written(model):
    with torch.no_grad():
        model.adapters["default"].encoder.prompts.mul_(2.0)


def _data_written(model):
    prompts = model.adapters["default"].encoder.prompts
    prompts.data = prompts.data * 2.0


@pytest.mark.parametrize(
    "change", [_optimizer_step, _loaded, _assigned, _written, _data_written], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("injection", ["deep", "prefix"])
def test_keys_and_values_follow_the_parameters(injection, change):
    model = tiny_model("bert", injection)
    before = _evaluated(model)
    change(model)
    after = _evaluated(model)
    assert_differs(after, before)
    fresh = tiny_model("bert", injection)
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(after, _evaluated(fresh))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_keys_and_values_follow_the_base(family):
    """The base cast to another dtype, or given other weights."""
    model = tiny_model(family, "deep")
    before = _evaluated(model)
    model.base_model.to(torch.float64)
    assert _evaluated(model).dtype == torch.float64
    model.base_model.to(torch.float32)
    assert_same_bits(_evaluated(model), before)
    other = tiny_base(family, seed=1)
    model.base_model.load_state_dict(other.state_dict())
    fresh = get_ptv2_model(other, tiny_prompts("deep")).eval()
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(_evaluated(model), _evaluated(fresh))
    assert_differs(_evaluated(model), before)


def test_keys_and_values_follow_a_change_deep_inside_the_base():
    model = tiny_model("bert", "deep")
    before = _evaluated(model)
    key = model.backbone.encoder.layer[1].attention.self.key
    with torch.no_grad():
        key.weight.mul_(-1.0)
    fresh = tiny_model("bert", "deep")
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        fresh.backbone.encoder.layer[1].attention.self.key.weight.mul_(-1.0)
    after = _evaluated(model)
    assert_differs(after, before)
    assert_same_bits(after, _evaluated(fresh))


def test_inference_mode():
    for injection in INJECTIONS:
        model = tiny_model("llama", injection)
        expected = _evaluated(model)
        with torch.inference_mode():
            assert_same_bits(model(**BATCH.inputs).last_hidden_state[REAL], expected)
        assert_same_bits(_evaluated(model), expected)
        # What inference mode left behind must not poison training.
        model.train()
        model(**BATCH.inputs).last_hidden_state.sum().backward()


# Lower precision.


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_base_trains_float32_prompts(family, injection):
    task = _task_of(family)
    exact = tiny_model(family, injection, task)
    with torch.no_grad():
        expected = exact(**BATCH.inputs).logits[REAL]
    base = tiny_base(family, task).to(torch.bfloat16)
    model = get_ptv2_model(base, tiny_prompts(injection, task))
    model.load_state_dict(exact.state_dict())
    model.train()
    output = model(**BATCH.inputs, labels=_labels(task))
    if family not in MIXTURES:  # rounding decides which experts a token gets
        assert_equal(output.logits[REAL].float(), expected, dtype=torch.bfloat16)
    output.loss.backward()
    for name, parameter in model.adapters.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if "encoder" in name:
            assert parameter.dtype == torch.float32, name


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family, injection):
    task = _task_of(family)
    model = tiny_model(family, injection, task).train()
    plain = model(**BATCH.inputs, labels=_labels(task))
    plain_grads = torch.autograd.grad(plain.loss, list(model.adapters["default"].encoder.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**BATCH.inputs, labels=_labels(task))
    assert_equal(output.logits[REAL].float(), plain.logits[REAL], dtype=torch.bfloat16)
    assert not torch.equal(output.logits[REAL].float(), plain.logits[REAL]), "autocast did nothing"
    grads = torch.autograd.grad(output.loss, list(model.adapters["default"].encoder.parameters()))
    for grad, expected in zip(grads, plain_grads, strict=True):
        assert grad.dtype == torch.float32
        similarity = torch.cosine_similarity(grad.flatten(), expected.flatten(), dim=0)
        assert similarity > 0.98


# torch.compile.


# Each family with prompts in every layer, where its own projections make them, and with one of the other two, which
# reach its layers as rows or as ready keys and values. Mistral's layers take those as Llama's do.
COMPILED = {
    "bert": ("deep", "prefix"),
    "modernbert": ("deep", "shallow"),
    "llama": ("deep", "prefix"),
    "gpt2": ("deep", "shallow"),
    "mistral": ("deep",),
    "mpnet": ("deep", "shallow"),
    "deberta-v2": ("deep", "shallow"),
}


@pytest.mark.parametrize(
    ("family", "injection"), [(family, injection) for family, ways in COMPILED.items() for injection in ways]
)
def test_compiles_without_a_graph_break(family, injection):
    _check_compiled(family, injection, fullgraph=view.TRACES_VIEWS)


@pytest.mark.parametrize(("family", "injection"), [("bert", "shallow"), ("llama", "deep"), ("mpnet", "prefix")])
def test_compiles_where_views_are_made_between_two_graphs(family, injection, monkeypatch):
    monkeypatch.setattr(view, "TRACES_VIEWS", False)
    _check_compiled(family, injection, fullgraph=False, backend="eager")


def _check_compiled(family, injection, fullgraph, backend=None):
    task = _task_of(family)
    # Tracing takes its time: two layers where they differ, and once where prompts are in each.
    layers = 2 if family == "modernbert" or (fullgraph and family == "bert" and injection == "deep") else 1
    model = tiny_model(family, injection, task, base_changes={"num_hidden_layers": layers}).train()
    inputs = {**BATCH.inputs, "labels": _labels(task)}
    if task == "CAUSAL_LM":
        inputs["use_cache"] = False
    if family == "gpt2":
        # transformers warns that it does not know the loss of GPT2LMHeadModel, which breaks a graph.
        model.base_model.loss_type = "ForCausalLM"

    def step(run):
        model.zero_grad()
        loss = run(**inputs).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.adapters.parameters()]

    torch.compiler.reset()
    # A fresh wrapper, in its first forward.
    # Whole graphs are found with any backend; what autograd makes of one is traced once for each kind of attention.
    joint = injection == "deep" and family in ("bert", "llama", "deberta-v2")
    backend = backend or ("aot_eager" if joint else "eager")
    loss, grads = step(torch.compile(model, fullgraph=fullgraph, backend=backend))
    expected_loss, expected = step(model)
    assert_equal(loss, expected_loss)
    for grad, reference in zip(grads, expected, strict=True):
        assert_equal(grad, reference)
