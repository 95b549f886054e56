"""PTuningV2Model: learns through its prefix alone, which evolves with every text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ptv2_fast.reference.evolving_tutorial import IGNORED_LABEL, PTuningV2Model, TransformerLayer
from ptv2_fast.reference.masks import additive_mask

P = 4


@pytest.fixture
def make_model():
    def make(**changes) -> PTuningV2Model:
        torch.manual_seed(2)
        sizes = {"vocab_size": 40, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32}
        model = PTuningV2Model(**(sizes | {"prefix_len": P, "max_length": 12} | changes))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        return model.double()

    return make


def _fit(model: PTuningV2Model, batch, steps: int = 60) -> list[float]:
    """Learn to answer every word with word 7."""
    labels = torch.where(batch.attention_mask.bool(), 7, IGNORED_LABEL)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.1)
    losses = []
    for _ in range(steps):
        loss, _ = model(batch.input_ids, batch.attention_mask, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_loss_falls_and_the_base_stays_bit_identical(make_model, rows, pad, causal):
    model = make_model(causal=causal)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = _fit(model, pad(rows, "right"))
    assert losses[-1] < 0.8 * losses[0]
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {"prefix"}


def test_only_the_prefix_gets_gradients(make_model, rows, pad):
    model = make_model()
    batch = pad(rows, "left")
    loss, _ = model(batch.input_ids, batch.attention_mask, batch.input_ids)
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"prefix"}
    assert (model.prefix.grad.abs().amax(dim=1) > 1e-6).all()


def test_an_unfrozen_base_trains_until_it_is_frozen(make_model, rows, pad):
    model = make_model(freeze=False)
    assert all(p.requires_grad for p in model.parameters())
    word_embeddings = model.word_embeddings.weight.clone()
    _fit(model, pad(rows, "right"), steps=1)
    assert not torch.equal(model.word_embeddings.weight, word_embeddings)
    model.freeze_base()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prefix"]


def _rows_after_first_layer(model: PTuningV2Model, input_ids: Tensor) -> Tensor:
    seen = []
    handle = model.layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
    model(input_ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_prefix_rows_evolve_with_the_text_where_they_can_see_it(make_model, causal):
    model = make_model(causal=causal)
    prefix = _rows_after_first_layer(model, torch.tensor([[5, 6, 7], [8, 9, 10]]))[:, :P]
    difference = (prefix[0] - prefix[1]).abs().max()
    assert difference < 1e-12 if causal else difference > 1e-3


def test_causal_rows_do_not_see_the_words_behind_them(make_model):
    first, second = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    for causal in (True, False):
        model = make_model(causal=causal)
        difference = (model(first) - model(second))[0, :3].abs().max()
        assert difference < 1e-12 if causal else difference > 1e-3


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_padded_rows_are_the_rows_alone(make_model, rows, pad, causal):
    model = make_model(causal=causal)
    for side in ("left", "right", "holes"):
        batch = pad(rows, side)
        logits = model(batch.input_ids, batch.attention_mask)
        assert logits.shape == (3, 9, 40)
        for index, row in enumerate(rows):
            alone = model(row[None])[0]
            torch.testing.assert_close(batch.real(logits, index), alone, rtol=0, atol=1e-10)


def test_loss_counts_the_labelled_text_rows_only(make_model, rows, pad):
    model = make_model()
    batch = pad(rows, "right")
    labels = torch.full_like(batch.input_ids, IGNORED_LABEL)
    labels[0, 1], labels[2, 6] = 11, 3
    loss, logits = model(batch.input_ids, batch.attention_mask, labels)
    by_hand = -(logits[0, 1].log_softmax(0)[11] + logits[2, 6].log_softmax(0)[3]) / 2
    torch.testing.assert_close(loss, by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits, model(batch.input_ids, batch.attention_mask))
    nothing, _ = model(batch.input_ids, batch.attention_mask, labels.fill_(IGNORED_LABEL))
    assert nothing == 0


def test_a_layer_is_torchs_transformer_encoder_layer(rows):
    torch.manual_seed(4)
    layer = TransformerLayer(16, 2, 32).double()
    peer = nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, activation="gelu", batch_first=True, dtype=torch.float64
    )
    names = {
        "self_attn.in_proj_weight": "qkv.weight",
        "self_attn.in_proj_bias": "qkv.bias",
        "self_attn.out_proj.weight": "output.weight",
        "self_attn.out_proj.bias": "output.bias",
        "linear1.weight": "ffn.0.weight",
        "linear1.bias": "ffn.0.bias",
        "linear2.weight": "ffn.2.weight",
        "linear2.bias": "ffn.2.bias",
        "norm1.weight": "attention_norm.weight",
        "norm1.bias": "attention_norm.bias",
        "norm2.weight": "ffn_norm.weight",
        "norm2.bias": "ffn_norm.bias",
    }
    weights = layer.state_dict()
    peer.load_state_dict({theirs: weights[ours] for theirs, ours in names.items()})
    hidden = torch.randn(2, 5, 16, dtype=torch.float64)
    key_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    output = layer(hidden, additive_mask(key_mask, 0, causal=False, dtype=hidden.dtype))
    expected = peer(hidden, src_key_padding_mask=~key_mask)
    torch.testing.assert_close(output[key_mask], expected[key_mask], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"prefix_len": 0}, "prefix_len must be a positive integer; got 0", id="no-p"),
        pytest.param({"d_ff": 2.5}, "d_ff must be a positive integer; got 2.5", id="fraction"),
        pytest.param({"num_heads": 3}, "d_model must be a multiple of num_heads", id="heads"),
    ],
)
def test_bad_sizes_are_refused(make_model, changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


def test_bad_inputs_are_refused(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="input_ids must have at most 12 tokens; got 13"):
        model(torch.ones(1, 13, dtype=torch.long))
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels must be \(2, 5\); got \(2, 9\)"):
        model(ids, labels=torch.ones(2, 9, dtype=torch.long))
