"""Methods that would run or count the bare base mean the wrapped model, or are refused."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast.heads import classification_loss
from ptv2_fast.inputs.right_padding import to_right_padding
from ptv2_fast.task_models import continuous_batching
from tiny_models import tiny_base, tiny_model
from tiny_seq2seq import T5_SERVED
from tiny_seq2seq import tiny_model as tiny_seq2seq
from tolerances import assert_equal

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
needs_t5 = pytest.mark.skipif(not T5_SERVED, reason="this transformers' T5 has an attention of its own")
KINDS = [pytest.param("t5", marks=needs_t5), "bart", "mbart"]
INJECTIONS = ["deep", "shallow", "prefix"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def test_parameters_of_the_adapters_count():
    model = tiny_model("bert", "deep", "SEQ_CLS")
    trained, total = model.trainable_parameters()
    assert (model.num_parameters(only_trainable=True), model.num_parameters()) == (trained, total)
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    assert model.num_parameters(exclude_embeddings=True) == total - embeddings
    tensors = [*model.parameters(), *model.buffers()]
    assert model.get_memory_footprint() == sum(tensor.nbytes for tensor in tensors)


CONTINUOUS = ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]


@pytest.mark.parametrize("method", CONTINUOUS)
def test_continuous_batching_would_run_the_bare_model(method, monkeypatch):
    model = tiny_model("llama", "deep", "SEQ_CLS")
    with pytest.raises(ValueError, match=f"{method} must be called on a causal language model, or within disable_adap"):
        getattr(model, method)([[5, 6]])
    monkeypatch.setattr(model.base_model, method, lambda *rows, **options: rows[0], raising=False)
    with model.disable_adapter():
        assert getattr(model, method)([[5, 6]]) == [[5, 6]]


@pytest.mark.parametrize("method", CONTINUOUS)
def test_continuous_batching_with_adapters_needs_a_newer_transformers(method, monkeypatch):
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    monkeypatch.setattr(continuous_batching, "SERVED", False)
    with pytest.raises(ValueError, match=r"must run on transformers 5\.19 or newer; got .* generate serves"):
        getattr(model, method)([[5, 6]])
    monkeypatch.setattr(model.base_model, method, lambda *rows, **options: rows[0])
    with model.disable_adapter():
        assert getattr(model, method)([[5, 6]]) == [[5, 6]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("injection", INJECTIONS)
def test_generation_goes_on_from_the_encoder_of_the_model(kind, injection):
    model = tiny_seq2seq(kind, injection)
    expected = model.generate(IDS, attention_mask=MASK, **GREEDY)
    encoded = model.get_encoder()(input_ids=IDS, attention_mask=MASK)
    found = model.generate(encoder_outputs=encoded, attention_mask=MASK, **GREEDY)
    assert torch.equal(found, expected)
    with model.disable_adapter():
        encoded = model.get_encoder()(IDS, MASK)
        bare = model.base_model.get_encoder()(IDS, MASK)
    assert_equal(encoded.last_hidden_state, bare.last_hidden_state, "the bare encoder's states")


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_of_an_encoder_decoder_has_its_prompts(kind):
    model = tiny_seq2seq(kind)
    output = model(input_ids=IDS, decoder_input_ids=IDS, output_hidden_states=True)
    encoded = model.get_encoder()(IDS).last_hidden_state
    found = model.get_decoder()(input_ids=IDS, encoder_hidden_states=encoded).last_hidden_state
    assert_equal(found, output.decoder_hidden_states[-1], "states")
    assert model.get_encoder().config is model.base_model.get_encoder().config, "it is looked at like the base's"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_the_decoder_of_a_causal_model_has_its_prompts(family, injection):
    model = tiny_model(family, injection, "CAUSAL_LM")
    states = model.get_decoder()(IDS, attention_mask=MASK).last_hidden_state
    expected = model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    assert_equal(model.get_output_embeddings()(states)[MASK.bool()], expected, "logits")
    assert isinstance(model.get_decoder()(IDS, return_dict=False), tuple)
    model.get_decoder()(IDS).last_hidden_state.sum().backward()
    assert model.adapters["default"].encoder.prompts.grad.abs().max() > 0


def test_a_part_that_reads_hidden_states_is_the_bases():
    model = tiny_model("bert", "deep", "SEQ_CLS")
    assert model.get_encoder() is model.base_model.get_encoder()
    assert tiny_model("llama", "deep", "CAUSAL_LM").get_encoder().__class__.__name__.startswith("PTuningV2")


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_of_an_encoder_decoder_is_refused_by_name(kind):
    model = tiny_seq2seq(kind)
    with pytest.raises(ValueError, match="guidance_scale must be None .* got 1.5"):
        model.generate(IDS, guidance_scale=1.5, **GREEDY)
    model.generation_config.guidance_scale = 2.0
    with pytest.raises(ValueError, match="guidance_scale must be None .* got 2.0"):
        model.generate(IDS, **GREEDY)
    model.generate(IDS, guidance_scale=1, **GREEDY)


def test_an_early_exit_is_refused_by_name():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    with pytest.raises(ValueError, match="assistant_early_exit must be None: .* got 1"):
        model.generate(IDS[:1], assistant_early_exit=1, **GREEDY)


def test_gradients_of_single_rows_by_vmap():
    """As the bare model serves them, where no mask is given."""
    model = tiny_model("bert", "prefix", "SEQ_CLS", heads={"task": 3})
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    labels = torch.tensor([0, 2])

    def loss(parameters, ids, label):
        call = {"input_ids": ids[None], "labels": label[None]}
        return torch.func.functional_call(model, parameters, (), call).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(trained, IDS, labels)
    for row, label, index in zip(IDS, labels, range(2), strict=True):
        for name, gradient in torch.func.grad(loss)(trained, row, label).items():
            torch.testing.assert_close(found[name][index], gradient, rtol=1e-4, atol=1e-6)


def test_sizes_can_be_asked_without_weights():
    model = tiny_model("bert", "deep", "TOKEN_CLS").to("meta")
    assert model(input_ids=IDS.to("meta")).logits.shape == (2, 4, 3)


@pytest.mark.parametrize("masked", [MASK, torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]), MASK.bool()])
def test_tokens_first_keeps_their_order(masked):
    turned, back = to_right_padding({"input_ids": IDS, "attention_mask": masked})
    for row, mask, found in zip(IDS, masked, turned["input_ids"], strict=True):
        assert found.tolist() == [*row[mask.bool()].tolist(), *row[~mask.bool()].tolist()]
    assert torch.equal(turned["input_ids"].gather(1, back), IDS)


# torch announces that its tracer goes; what was asked of it until then is answered.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [pytest.param("t5", marks=needs_t5), "bart", "mbart", "roberta"])
def test_a_model_whose_mask_may_blind_a_row_can_be_traced(case):
    seq2seq = case != "roberta"
    model = tiny_seq2seq(case) if seq2seq else tiny_model(case, "shallow", "SEQ_CLS")
    if seq2seq:  # a trace returns tensors alone, and a cache is none
        for config in (model.config, model.backbone.decoder.config):
            config.use_cache = False
    given = (IDS, MASK, IDS) if seq2seq else (IDS, MASK)
    # What torch would compare by tracing once more, on the same texts, is compared on others.
    traced = torch.jit.trace(model, given, strict=False, check_trace=False)
    again = (IDS.flip(0), *given[1:])
    torch.testing.assert_close(traced(*again)["logits"], model(*again).logits)


def test_labels_are_looked_at_where_they_can_be():
    with pytest.raises(ValueError, match="labels must lie in"):
        classification_loss(torch.zeros(2, 3), torch.tensor([0, 7]))
    assert tiny_base("bert").config.num_labels == 3
