"""MPNet and DeBERTa: distances as transformers counts them, where a prompt stands, and what a step leaves out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from batches import padded, text_rows
from ptv2_fast.families import deberta, mpnet
from ptv2_fast.families.registry import family_of
from tiny_models import RELATIVE, tiny_base, tiny_model
from tolerances import assert_differs, assert_equal, assert_same_bits

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 9, 33, 34, 64, 65, 129, 130, 300, 700)


@pytest.mark.parametrize(
    ("buckets", "longest"), [(8, 64), (7, 64), (64, 40), (64, 100), (256, 512), (-1, 20), (-1, 512)]
)
def test_debertas_distances_are_transformers_own(buckets, longest):
    encoder = SimpleNamespace(position_buckets=buckets, max_relative_positions=longest)
    span = buckets if buckets > 0 else longest
    for tokens in LENGTHS:
        text = torch.zeros(tokens, 1)
        expected = build_relative_position(text, text, buckets, longest)[0]
        found = deberta.distances(encoder, tokens, torch.device("cpu"))
        assert torch.equal(found.rows + found.first, (expected + span).clamp(0, 2 * span - 1)), tokens
        # What transformers gathers for a key, it gathers by the same rows turned over.
        assert torch.equal((found.rows + found.first).t(), (-expected + span).clamp(0, 2 * span - 1)), tokens
        assert 0 <= found.rows.min() and found.rows.max() < found.end - found.first <= 2 * span


def test_mpnets_bias_is_transformers_own():
    base = tiny_base("mpnet")
    for tokens in LENGTHS:
        found = mpnet.position_bias(base.encoder.relative_attention_bias.weight, tokens)
        assert torch.equal(found, base.encoder.compute_position_bias(torch.zeros(1, tokens, 1)))


@pytest.mark.parametrize("family", RELATIVE)
def test_a_prompt_stands_where_the_last_query_has_the_first_token_of_a_long_text(family):
    base = tiny_base(family, exact=True)
    keys = torch.randn(4, 5, 8, dtype=torch.float64)
    placed, bias = family_of(base).far_keys_and_bias(base, 1, keys)
    if family == "mpnet":
        far = mpnet.position_bias(base.encoder.relative_attention_bias.weight, 700)[0, :, -1, 0]
        assert_equal(bias, far[:, None].expand(4, 5))
        assert torch.equal(placed, keys)
        return
    module, query = base.encoder.layer[1].attention.self, torch.randn(4, 1, 8, dtype=torch.float64)
    row = deberta.distances(base.encoder, 700, torch.device("cpu")).rows[-1, 0]
    embedding = base.encoder.get_rel_embedding()[row]
    position_key, position_query = (
        project(embedding).view(4, 1, 8) for project in (module.key_proj, module.query_proj)
    )
    scores = query @ keys.mT + query @ position_key.mT + (keys @ position_query.mT).mT
    assert_equal((query @ placed.mT)[:, 0] / 24**0.5 + bias, scores[:, 0] / 24**0.5)


@pytest.mark.parametrize("family", RELATIVE)
def test_where_a_prompt_stands_does_not_depend_on_how_long_it_is(family):
    """Virtual tokens of which the second half repeats the first have the mass of a gate of log 2 on the first."""
    model = tiny_model(family, "prefix", length=3, exact=True, prompt_init="gated")
    longer = tiny_model(family, "prefix", length=6, exact=True)
    with torch.no_grad():
        model.adapters["default"].encoder.gate.fill_(0.6931471805599453)
        prompts = model.adapters["default"].encoder.prompts
        longer.adapters["default"].encoder.prompts.copy_(torch.cat([prompts, prompts], dim=-2))
    batch = padded(text_rows(), "right")
    real = batch.attention_mask.bool()
    one, other = (m(**batch.inputs).last_hidden_state[real] for m in (model, longer))
    assert_equal(one, other)


@pytest.mark.parametrize("injection", ["deep", "shallow"])
@pytest.mark.parametrize("family", RELATIVE)
def test_no_mask_of_all_pairs_is_built(family, injection):
    """What there is for every pair of tokens has every head: a term of position, or scores."""
    found = []

    class Pairs(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.shape[-2:] == (rows, rows) and output.dim() > 2:
                found.append(tuple(output.shape))
            return output

    model = tiny_model(family, injection)
    batch = padded(text_rows(), "left", width=11)
    rows = 11 + (5 if injection == "shallow" else 0)
    with Pairs():
        model(**batch.inputs)
    assert found and all(shape[-3] in (4, 12) for shape in found)


def test_distances_are_found_once_a_forward():
    """Layers share them; each gathers once by query and once by key."""
    counts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    for layers in (2, 4):
        model = tiny_model("deberta-v2", "deep", base_changes={"num_hidden_layers": layers})
        calls: list[str] = []
        with Count():
            model(input_ids=torch.randint(2, 40, (2, 11)))
        counts.append([calls.count(name) for name in ("arange", "log", "gather")])
    assert counts[0][:2] == counts[1][:2] and counts[0][1] == 1
    assert [count[2] for count in counts] == [4, 8]


@pytest.mark.parametrize("injection", ["deep", "shallow"])
def test_embeddings_of_distances_are_dropped_out_while_training(injection):
    model = tiny_model("deberta-v2", injection).train()
    for layer in model.backbone.encoder.layer:
        layer.attention.self.pos_dropout.p = 0.5
    ids = torch.randint(2, 40, (2, 7))
    first, second = (model(input_ids=ids).last_hidden_state for _ in range(2))
    assert_differs(first, second)
    model.eval()
    assert_same_bits(model(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)


def test_a_prompts_distance_is_dropped_out_while_training():
    base = tiny_base("deberta-v2").train()
    base.encoder.layer[0].attention.self.pos_dropout.p = 0.5
    keys = torch.randn(4, 5, 8)
    first, second = (family_of(base).far_keys_and_bias(base, 0, keys) for _ in range(2))
    assert_differs(first[0], second[0])
    assert_differs(first[1], second[1])


@pytest.mark.parametrize("family", RELATIVE)
def test_a_layer_that_is_not_reached_is_noticed(family):
    model = tiny_model(family, "deep")
    layer = model.backbone.encoder.layer[1]
    layer.forward = lambda hidden, *args, **kwargs: (hidden, None)
    with pytest.raises(RuntimeError, match=r"Model did not reach layers \[1\]"):
        model(input_ids=torch.randint(2, 40, (1, 4)))
    del layer.forward
    model(input_ids=torch.randint(2, 40, (1, 4)))


@pytest.mark.parametrize("family", RELATIVE)
def test_the_base_is_never_written_to(family):
    model = tiny_model(family, "deep", "TOKEN_CLS")
    # Every view of a model has transformers install its hooks, which leaves this mark.
    mark = "_output_capturing_hooks_installed"

    def names():
        return [(name, set(vars(module)) - {mark}) for name, module in model.base_model.named_modules()]

    before = names()
    batch = padded(text_rows(), "left")
    model.train()(**batch.inputs, labels=batch.input_ids % 3).loss.backward()
    assert names() == before


def test_a_mask_of_pairs_is_added_to_mpnets_bias_and_refused_by_deberta():
    ids = torch.randint(2, 40, (2, 6))
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    model = tiny_model("mpnet", "deep")
    positions = torch.arange(2, 8).expand(2, -1)
    whole = real.bool()[:, None, None, :].expand(-1, 1, 6, -1)
    by_pairs = model(input_ids=ids, attention_mask=whole, position_ids=positions).last_hidden_state
    by_tokens = model(input_ids=ids, attention_mask=real).last_hidden_state
    assert_equal(by_pairs[real.bool()], by_tokens[real.bool()])
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, N\).*got \(2, 1, 6, 6\)"):
        tiny_model("deberta-v2", "deep")(input_ids=ids, attention_mask=whole)
