"""PTuningV2Model: learns through its prompts alone, which evolve with every text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ptv2_fast.reference.evolving_tutorial import PTuningV2Model, SimpleTransformerLayer

P, VOCABULARY = 4, 40


@pytest.fixture
def model() -> PTuningV2Model:
    """Without dropout, in float64; everything but the prompts is frozen, as the tutorial does it."""
    torch.manual_seed(2)
    model = PTuningV2Model(VOCABULARY, d_model=16, num_layers=2, num_heads=2, d_ff=32, prefix_len=P)
    for name, parameter in model.named_parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
        parameter.requires_grad_("prompt_embeddings" in name)
    return model.double().eval()


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(3))


def _loss(logits: Tensor) -> Tensor:
    """Answer every word with word 7."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), torch.full(logits.shape[:2], 7).flatten())


def test_loss_falls_and_the_base_stays_bit_identical(model, input_ids):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam([model.prompt_embeddings], lr=0.1)
    losses = []
    for _ in range(60):
        loss = _loss(model(input_ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {"prompt_embeddings"}


def test_only_the_prompts_get_gradients(model, input_ids):
    _loss(model(input_ids)).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"prompt_embeddings"}
    assert (model.prompt_embeddings.grad.abs().amax(dim=1) > 1e-6).all()


def test_prompts_evolve_with_the_text(model):
    seen = []
    model.layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
    assert model(torch.tensor([[5, 6, 7], [8, 9, 10]])).shape == (2, 3, VOCABULARY)
    first, second = seen[0][:, :P]
    assert (first - second).abs().max() > 1e-3


def test_logits_are_the_texts(model, input_ids):
    """By hand: every row in front of the output layer, then those behind the prompts."""
    rows = [torch.cat([model.prompt_embeddings, model.word_embeddings(row)])[None] for row in input_ids]
    by_hand = [model.output_layer(model.layers[1](model.layers[0](row)))[0, P:] for row in rows]
    torch.testing.assert_close(model(input_ids), torch.stack(by_hand), rtol=0, atol=1e-10)


def test_a_layer_is_torchs_transformer_encoder_layer():
    torch.manual_seed(4)
    layer = SimpleTransformerLayer(16, 2, 32).double().eval()
    peer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=torch.float64).eval()
    names = {"attention.": "self_attn.", "ffn.0.": "linear1.", "ffn.2.": "linear2."}
    weights = layer.state_dict()
    for ours, theirs in names.items():
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    peer.load_state_dict(weights)
    hidden = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(hidden), peer(hidden), rtol=0, atol=1e-10)
    blocked = torch.ones(5, 5).bool().triu(1)
    torch.testing.assert_close(layer(hidden, blocked), peer(hidden, src_mask=blocked), rtol=0, atol=1e-10)
