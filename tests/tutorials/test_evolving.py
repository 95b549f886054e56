"""The tutorial's PTuningV2Model, judged by its literal form: outputs, gradients, names, dropout, what is left out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from ptv2_fast.reference import evolving_tutorial as literal
from ptv2_fast.tutorials import PTuningV2Model, SimpleTransformerLayer
from shape_audit import ShapeAudit
from tolerances import assert_equal, assert_same_bits

SIZES = {"vocab_size": 40, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48, "prefix_len": 5}
DTYPES = [torch.float64, torch.float32]


def _pair(dtype: torch.dtype = torch.float64, **changes) -> list[nn.Module]:
    """The fast model and the literal one of the same seed."""
    made = []
    for kind in (PTuningV2Model, literal.PTuningV2Model):
        torch.manual_seed(1)
        made.append(kind(**{**SIZES, **changes}).to(dtype))
    return made


def _layers(dtype: torch.dtype = torch.float64, dropout: float = 0.1) -> list[nn.Module]:
    made = []
    for kind in (SimpleTransformerLayer, literal.SimpleTransformerLayer):
        torch.manual_seed(1)
        made.append(kind(32, 4, 48, dropout).to(dtype))
    return made


def _ids(rows: int = 3, tokens: int = 7) -> Tensor:
    return torch.randint(0, 40, (rows, tokens), generator=torch.Generator().manual_seed(3))


def _assert_alike(ours: nn.Module, theirs: nn.Module, inputs: Tensor, *more: Tensor) -> None:
    """The same outputs, and the same gradients of one loss over them."""
    (out, grads), (expected, expected_grads) = (_step(model, inputs, *more) for model in (ours, theirs))
    assert_equal(out, expected, "output")
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_equal(grad, expected_grads[name], name)


def _step(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(*inputs)
    out.sin().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _freeze(model: nn.Module) -> nn.Module:
    """As the tutorial does it."""
    for name, parameter in model.named_parameters():
        if "prompt_embeddings" not in name:
            parameter.requires_grad = False
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "all train"])
def test_logits_and_gradients_are_the_literal_forms(dtype, frozen):
    ours, theirs = (model.eval() for model in _pair(dtype))
    if frozen:
        _freeze(ours), _freeze(theirs)
    _assert_alike(ours, theirs, _ids())
    names = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert names == ({"prompt_embeddings"} if frozen else set(dict(ours.named_parameters())))


@pytest.mark.parametrize("changes", [{"num_layers": 1}, {"prefix_len": 1}, {"num_heads": 1}], ids=str)
def test_sizes_at_the_edge(changes):
    ours, theirs = (model.eval() for model in _pair(**changes))
    _assert_alike(ours, theirs, _ids(1, 1))


def test_the_kernels_agree():
    # Heads of 16 are the smallest that they take.
    ours, theirs = (_freeze(model).eval() for model in _pair(torch.float32, num_heads=2))
    for layer in ours.layers:
        layer.backend = "triton"
    _assert_alike(ours, theirs, _ids(2, 4))


def test_a_seed_gives_the_tutorials_parameters_under_its_names_and_in_its_order():
    ours, theirs = _pair()
    for (name, own), (their_name, their_own) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == their_name
        assert_same_bits(own, their_own, name)
    assert {"attention.in_proj_weight", "attention.out_proj.bias", "ffn.0.weight", "ffn.2.bias", "norm1.weight"} <= {
        name.removeprefix("layers.1.") for name in ours.state_dict()
    }
    assert ours.layers[0].dropout.p == theirs.layers[0].dropout.p == ours.layers[0].attention.dropout == 0.1
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        target.load_state_dict(source.state_dict())
        _assert_alike(target.eval(), source.eval(), _ids())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_the_tutorials(dtype):
    """One row: nn.MultiheadAttention gives the rows of a batch another order in memory, in which dropout is drawn."""
    ours, theirs = _layers(dtype, dropout=0.3)
    x = torch.randn(1, 9, 32, dtype=dtype)
    torch.manual_seed(5)
    out = ours(x)
    torch.manual_seed(5)
    assert_equal(out, theirs(x))
    # As there, each module's own mode and probability count.
    ours.dropout.eval(), theirs.dropout.eval()
    ours.attention.dropout = theirs.attention.dropout = 0.6
    torch.manual_seed(5)
    out = ours(x)
    torch.manual_seed(5)
    assert_equal(out, theirs(x))
    ours.attention.eval(), theirs.attention.eval()
    assert_equal(ours(x), theirs(x))


def test_a_model_in_training_drops():
    ours, theirs = _pair()
    for model in (ours, theirs):
        for layer in model.layers:
            layer.dropout.p = layer.attention.dropout = 0.0
    _assert_alike(ours.train(), theirs.train(), _ids())
    ours.layers[0].attention.dropout = 0.5
    assert not torch.equal(ours(_ids()), ours(_ids()))


@pytest.mark.parametrize("kind", ["bool", "float", "by head"])
def test_a_layer_takes_multihead_attentions_mask(kind):
    ours, theirs = (layer.eval() for layer in _layers())
    mask = torch.ones(6, 6).bool().triu(1)
    if kind != "bool":
        mask = torch.randn(2 * 4 if kind == "by head" else 1, 6, 6, dtype=torch.float64).squeeze(0)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    _assert_alike(ours, theirs, x, mask)
    assert_equal(ours(x, mask, first_row=2), theirs(x, mask)[:, 2:])


def test_nothing_is_joined_and_the_last_layer_and_the_output_layer_see_the_text_alone():
    ours, _ = (_freeze(model) for model in _pair(torch.float32))
    rows = []
    for module in (*(layer.ffn for layer in ours.layers), ours.output_layer):
        module.register_forward_hook(lambda _, inputs, __: rows.append(tuple(inputs[0].shape)))
    audit = ShapeAudit()
    with audit:
        logits = ours(_ids())
        logits.sum().backward()
    assert logits.shape == (3, 7, 40) and rows == [(3, 12, 32), (3, 7, 32), (3, 7, 32)]
    assert not audit.calls["cat"] and audit.calls["embedding"] == 1


def test_copies_are_whole():
    ours, _ = (model.eval() for model in _pair())
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same_bits(again(_ids()), ours(_ids()))
    half = ours.to(torch.bfloat16)
    assert half(_ids()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"prefix_len": 0}, "prefix_len must be a positive integer; got 0", id="no-p"),
        pytest.param({"d_ff": 2.5}, "d_ff must be a positive integer; got 2.5", id="fraction"),
        pytest.param({"num_heads": 3}, "d_model must be a multiple of num_heads; got 32 and 3", id="heads"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PTuningV2Model(**{**SIZES, **changes})


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match=r"input_ids must be \(B, N\); got \(7,\)"):
        PTuningV2Model(**SIZES)(_ids()[0])
    with pytest.raises(ValueError, match=r"mask must be \(M, M\) or \(B \* H, M, M\); got \(6,\)"):
        SimpleTransformerLayer(32, 4, 48)(torch.randn(1, 6, 32), torch.zeros(6))
