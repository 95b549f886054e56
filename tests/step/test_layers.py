"""Fused projections, rows that are read, compiled layers: each gives the plain step's losses and gradients."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from batches import padded, text_rows
from ptv2_fast import PTuningV2Config, get_ptv2_model
from ptv2_fast.step import layers as step_layers
from ptv2_fast.step.fused_projections import FusedProjections
from ptv2_fast.step.options import StepOptions
from tiny_models import DECODERS, FAMILIES, tiny_base, tiny_model
from tolerances import assert_equal

OFF = StepOptions(**{field.name: False for field in fields(StepOptions)})
USERS_COMPILER = step_layers.COMPILER


@pytest.fixture(autouse=True)
def light_compiler(monkeypatch):
    """What is compiled is traced whole, forward and backward, without generating code."""
    monkeypatch.setattr(step_layers, "COMPILER", "aot_eager")
    torch.compiler.reset()


def _losses_and_grads(model, options, inputs, steps=1):
    model.step_options = options
    model.zero_grad()
    losses = []
    for _ in range(steps):
        output = model(**inputs)
        output.loss.backward()
        losses.append(output.loss.detach())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _labelled(task, side="right"):
    batch = padded(text_rows(), side)
    mask = batch.inputs["attention_mask"]
    if task == "SEQ_CLS":
        labels = torch.randint(0, 3, (mask.shape[0],))
    elif task == "TOKEN_CLS":
        labels = torch.randint(0, 3, mask.shape).masked_fill(mask == 0, -100)
    else:
        labels = batch.inputs["input_ids"].masked_fill(mask.cumsum(-1) < 4, -100)
        labels = labels.masked_fill(mask == 0, -100)
    return {**batch.inputs, "labels": labels}


CASES = [
    pytest.param(family, task, id=f"{family}-{task}")
    for family in FAMILIES
    for task in ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM")
    if task != "CAUSAL_LM" or family in DECODERS
]


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("switch", ["fused_projections", "last_rows"])
@pytest.mark.parametrize(("family", "task"), CASES)
def test_each_switch_gives_the_plain_losses_and_gradients(family, task, switch, unpad):
    _compare(family, task, switch, unpad)


@pytest.mark.parametrize(
    ("family", "task", "unpad", "compiler", "layers"),
    [
        # PyTorch's attention over packed rows breaks graphs, a dozen a layer and a second each. Once for a layer that
        # reads states without a gradient and one that reads states with one, once for what autograd makes of the parts.
        ("bert", "TOKEN_CLS", True, "eager", 2),
        ("qwen3", "CAUSAL_LM", True, "aot_eager", 1),
        ("gpt2", "SEQ_CLS", False, "aot_eager", 2),
        ("mpnet", "TOKEN_CLS", True, "aot_eager", 2),
        ("deberta-v2", "TOKEN_CLS", True, "aot_eager", 2),
    ],
)
def test_compiled_layers_give_the_plain_losses_and_gradients(family, task, unpad, compiler, layers, monkeypatch):
    monkeypatch.setattr(step_layers, "COMPILER", compiler)
    _compare(family, task, "compile_layers", unpad, num_hidden_layers=layers)


@pytest.mark.parametrize(("family", "task"), [("bert", "TOKEN_CLS"), ("llama", "CAUSAL_LM")])
def test_the_compiler_that_users_get_gives_the_plain_loss(family, task, monkeypatch):
    """Code is generated and built, which takes its time: one layer, forward, and no lengths that change."""
    monkeypatch.setattr(step_layers, "COMPILER", USERS_COMPILER)
    model = tiny_model(family, "deep", task, base_changes={"num_hidden_layers": 1}).train()
    inputs = _labelled(task)
    model.step_options = OFF
    expected = model(**inputs).loss
    model.step_options = replace(OFF, compile_layers=True)
    assert_equal(model(**inputs).loss, expected, "loss")


def _compare(family, task, switch, unpad, **changes):
    changes |= {} if task == "CAUSAL_LM" else {"classifier_dropout": 0.0}
    model = tiny_model(family, "deep", task, base_changes=changes).train()
    inputs = _labelled(task)
    plain, expected = _losses_and_grads(model, OFF, inputs)
    on = replace(OFF, unpad=unpad, labelled_rows_loss=task == "CAUSAL_LM", **{switch: True})
    losses, grads = _losses_and_grads(model, on, inputs)
    assert_equal(losses[0], plain[0], "loss")
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert_equal(grad, expected[name], name)


def test_all_switches_at_once_and_gradient_checkpointing():
    model = tiny_model("llama", "deep", "CAUSAL_LM").train()
    inputs = _labelled("CAUSAL_LM", "left")
    plain, expected = _losses_and_grads(model, OFF, inputs)
    model.gradient_checkpointing_enable()
    on = StepOptions(**{field.name: True for field in fields(StepOptions)})
    on = replace(on, compile_layers=False, float8=None)
    losses, grads = _losses_and_grads(model, on, inputs)
    assert_equal(losses[0], plain[0], "loss")
    for name, grad in grads.items():
        assert_equal(grad, expected[name], name)


class _Products(TorchDispatchMode):
    """Shapes of the left operands of every matrix product."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left = args[0] if func is torch.ops.aten.mm.default else args[1]
            self.rows.append(left.shape[0])
        return func(*args, **(kwargs or {}))


def _forward_products(model, options, inputs) -> list[int]:
    model.step_options = options
    with _Products() as products:
        model(**inputs)
    return products.rows


@pytest.mark.parametrize(
    ("family", "saved_per_layer"), [("bert", 2), ("gpt2", 0), ("llama", 3), ("mpnet", 2), ("deberta-v2", 2)]
)
def test_fused_projections_are_one_product(family, saved_per_layer):
    model = tiny_model(family, "prefix").train()
    inputs = padded(text_rows(), "right").inputs
    plain = _forward_products(model, OFF, inputs)
    fused = _forward_products(model, replace(OFF, fused_projections=True), inputs)
    assert len(plain) - len(fused) == 2 * saved_per_layer


@pytest.mark.parametrize(("family", "products"), [("bert", 3), ("gpt2", 2), ("llama", 3)])
def test_the_last_layer_multiplies_only_what_is_read(family, products):
    model = tiny_model(family, "prefix", "SEQ_CLS", heads={"own": 3} if family != "bert" else None)
    model.train()
    inputs = padded(text_rows(), "right").inputs
    batch, tokens = inputs["input_ids"].shape
    plain = _forward_products(model, OFF, inputs)
    saved = _forward_products(model, replace(OFF, last_rows=True), inputs)
    assert len(plain) == len(saved)
    changed = [(a, b) for a, b in zip(plain, saved, strict=True) if a != b]
    assert changed == [(batch * tokens, batch)] * products


def test_hidden_states_that_are_asked_for_are_whole():
    model = tiny_model("bert", "deep", "SEQ_CLS").train()
    inputs = {**_labelled("SEQ_CLS"), "output_hidden_states": True}
    model.step_options = OFF
    expected = model(**inputs).hidden_states
    model.step_options = replace(OFF, last_rows=True)
    for found, wanted in zip(model(**inputs).hidden_states, expected, strict=True):
        assert_equal(found, wanted, "hidden states")


def _storage_bytes(module: nn.Module) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_fusing_leaves_no_trace_in_what_others_see(family, tmp_path):
    base = tiny_base(family)
    base.save_pretrained(tmp_path / "before")
    state = {name: value.clone() for name, value in base.state_dict().items()}
    size = _storage_bytes(base)
    parameters = dict(base.named_parameters())
    model = get_ptv2_model(base, PTuningV2Config("FEATURE_EXTRACTION", num_virtual_tokens=3, init_std=0.8)).train()
    model.step_options = replace(OFF, fused_projections=True)
    inputs = padded(text_rows(), "right").inputs
    model(**inputs)
    assert _storage_bytes(base) == size
    assert {n: id(p) for n, p in base.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert list(base.state_dict()) == list(state)
    for name, value in base.state_dict().items():
        assert torch.equal(value, state[name]), name
    base.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    owned = [p for p in model.unload().parameters()]
    assert len({p.untyped_storage().data_ptr() for p in owned}) == len(owned)


def _same_as_plain(model, inputs):
    model.step_options = OFF
    expected = model(**inputs).last_hidden_state
    model.step_options = replace(OFF, fused_projections=True)
    assert_equal(model(**inputs).last_hidden_state, expected, "states")
    return expected


def test_weights_may_be_moved_cast_and_loaded_after_fusing():
    model = tiny_model("llama", "prefix").train()
    inputs = padded(text_rows(), "right").inputs
    first = _same_as_plain(model, inputs)
    model.base_model.load_state_dict(tiny_base("llama", seed=7).state_dict())
    assert not torch.allclose(_same_as_plain(model, inputs), first, atol=1e-2)
    model.base_model.double()
    assert _same_as_plain(model, inputs).dtype == torch.float64


def test_two_wrappers_of_one_base_share_the_buffer():
    base = tiny_base("bert")
    config = PTuningV2Config("FEATURE_EXTRACTION", num_virtual_tokens=3, init_std=0.8)
    models = [get_ptv2_model(base, config).train() for _ in range(2)]
    inputs = padded(text_rows(), "right").inputs
    size = _storage_bytes(base)
    expected = [_same_as_plain(model, inputs) for model in models]
    assert _storage_bytes(base) == size
    addresses = [p.data_ptr() for p in base.parameters()]
    for model, wanted in zip(models, expected, strict=True):
        assert_equal(model(**inputs).last_hidden_state, wanted, "states")
    assert [p.data_ptr() for p in base.parameters()] == addresses


def test_maps_that_train_are_hooked_or_are_not_linear_stay_as_they_are():
    class Other(nn.Linear):
        pass

    layer = nn.Module()
    layer.query, layer.key, layer.value = (nn.Linear(4, 4) for _ in range(3))
    assert len(FusedProjections(layer)) == 0
    layer.requires_grad_(False)
    assert len(FusedProjections(layer)) == 1
    fused = FusedProjections(layer)
    for register in (
        layer.key.register_forward_hook,
        layer.key.register_forward_pre_hook,
        layer.key.register_full_backward_hook,
        layer.key.register_full_backward_pre_hook,
    ):
        assert len(fused.modules()) == 3
        hook = register(lambda *_: None)
        assert len(FusedProjections(layer)) == len(fused.modules()) == 0
        hook.remove()
    layer.key = Other(4, 4).requires_grad_(False)
    assert len(FusedProjections(layer)) == 0


def test_maps_with_inputs_of_their_own_are_computed_alone():
    layer = nn.Module()
    layer.query, layer.key, layer.value = (nn.Linear(4, 4).requires_grad_(False) for _ in range(3))
    modules = FusedProjections(layer).modules()
    text, image = torch.randn(2, 4), torch.randn(3, 4)
    assert_equal(modules["query"](text), layer.query(text), "query")
    assert_equal(modules["key"](image), layer.key(image), "key of another input")
    assert_equal(modules["value"](image), layer.value(image), "value of another input")


@pytest.mark.parametrize("family", ["llama", "bert", "mpnet", "deberta-v2"])
def test_layers_of_one_kind_share_what_was_compiled(family, monkeypatch):
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(step_layers, "COMPILER", compiler)
    model = tiny_model(family, "deep", base_changes={"num_hidden_layers": 4}).train()
    model.step_options = replace(OFF, compile_layers=True)
    inputs = padded(text_rows(), "right").inputs
    for _ in range(2):
        model(**inputs).last_hidden_state.sum().backward()
    # The first layer reads states without a gradient, the others states with one.
    assert 0 < len(graphs) <= 2


def test_a_map_that_is_changed_after_fusing_is_left_alone():
    model = tiny_model("llama", "prefix").train()
    inputs = padded(text_rows(), "right").inputs
    model.step_options = replace(OFF, fused_projections=True)
    model(**inputs)
    attention = model.backbone.layers[0].self_attn
    called = []
    hook = attention.k_proj.register_forward_hook(lambda *_: called.append(1))
    model(**inputs)
    assert called == [1]
    hook.remove()
    attention.q_proj.weight.requires_grad_(True)
    model(**inputs).last_hidden_state.sum().backward()
    assert attention.q_proj.weight.grad is not None
    attention.q_proj = nn.Linear(32, 32, bias=False).requires_grad_(False)
    _same_as_plain(model, inputs)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_first_fused_step_through_the_kernels_has_the_plain_gradients(family):
    grads = {}
    # The interpreter takes its time over every program: one layer, two heads, two rows.
    changes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    changes |= {"head_dim": 16} if family == "llama" else {}
    for on in (False, True):
        torch.manual_seed(4)
        model = tiny_model(family, "deep", backend="triton", base_changes=changes).train()
        model.step_options = replace(OFF, fused_projections=on)
        output = model(**padded(text_rows(5, 7), "right").inputs).last_hidden_state
        # What the weights' former memory would hold by the time of the backward pass.
        junk = [torch.full((32, 32), 1e30) for _ in range(64)]
        output.square().mean().backward()
        grads[on] = [p.grad for p in model.parameters() if p.grad is not None]
        del junk
    for found, expected in zip(grads[True], grads[False], strict=True):
        assert_equal(found, expected, "gradient")
