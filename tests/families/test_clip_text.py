"""CLIP's text tower: causal, with learned positions, and pooled at its end of text."""

from __future__ import annotations

import pytest
import torch

from batches import packed, padded
from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, StepOptions, get_ptv2_model
from shape_audit import ShapeAudit
from tiny_features import (
    END_ID,
    HEADS,
    HIDDEN,
    VOCABULARY,
    clip_rows,
    gradients,
    literal_states,
    tiny_base,
    tiny_model,
)
from tiny_folders import tiny_tokenizer
from tiny_models import INJECTIONS, tiny_prompts
from tolerances import assert_differs, assert_equal, assert_same_bits

FAMILY = "clip_text_model"
# With 2 the end of text is the highest id of a row, as in configurations from before it was corrected.
ENDS = pytest.mark.parametrize("end", [END_ID, 2], ids=["end", "highest"])


def _alone(model, row, **options):
    return model(input_ids=row[None], **options)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_the_literal_form(injection, side):
    model, backbone = tiny_model(FAMILY, injection, exact=True), tiny_base(FAMILY, exact=True)
    batch = padded(clip_rows(), side)
    real = batch.attention_mask.bool()
    output = model(**batch.inputs, output_hidden_states=True)
    last, states = literal_states(model, backbone, batch.input_ids, batch.attention_mask)
    assert_equal(output.last_hidden_state[real], last[real])
    for own, expected in zip(output.hidden_states[:-1], states[:-1], strict=True):
        assert_equal(own[real], expected[real])
    weights = torch.randn(int(real.sum()), HIDDEN, dtype=torch.float64)
    fast = gradients((output.last_hidden_state[real] * weights).sum(), model)
    slow = gradients((last[real] * weights).sum(), model)
    for name, gradient in fast.items():
        assert gradient.abs().max() > 1e-6
        assert_equal(gradient, slow[name], name)


@ENDS
@pytest.mark.parametrize("training", [False, True], ids=["eval", "unpadded"])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_a_padded_row_is_the_row_alone_and_so_is_what_is_pooled(injection, training, end):
    """Also where padding has the id of the end of text, as CLIP's tokenizer has it."""
    model = tiny_model(FAMILY, injection, kind="projection", base_changes={"eos_token_id": end}).train(training)
    rows = clip_rows()
    alone = [PTuningV2Model.forward(model, input_ids=row[None]) for row in rows]
    for side in ("left", "right", "holes"):
        for padding in (1, END_ID):
            batch = padded(rows, side)
            ids = batch.input_ids.masked_fill(batch.attention_mask == 0, padding)
            output = PTuningV2Model.forward(model, input_ids=ids, attention_mask=batch.attention_mask)
            for index, expected in enumerate(alone):
                assert_equal(batch.real(output.last_hidden_state, index), expected.last_hidden_state[0])
                assert_equal(output.text_embeds[index], expected.text_embeds[0], f"{side}, row {index}")


@ENDS
def test_it_pools_what_the_tower_itself_pools(end):
    """Without a prompt in the way: the base row of a mixed batch, and where a text has no end at all."""
    changes = {"base_changes": {"eos_token_id": end}}
    model, base = tiny_model(FAMILY, "deep", **changes), tiny_base(FAMILY, eos_token_id=end)
    for row in (clip_rows(6)[0], torch.tensor([5, 9, 7, 3]), torch.tensor([7, END_ID, 5, END_ID])):
        bare = base(input_ids=row[None]).pooler_output
        assert_equal(_alone(model, row, adapter_names=["__base__"]).pooler_output, bare)
        assert_differs(_alone(model, row).pooler_output, bare)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_packed_rows_are_separate_rows(injection):
    model = tiny_model(FAMILY, injection)
    rows = clip_rows(5, 2, 7)
    states = model(**packed(rows)).last_hidden_state[0].split([len(row) for row in rows])
    for own, row in zip(states, rows, strict=True):
        assert_equal(own, _alone(model, row).last_hidden_state[0])


@pytest.mark.parametrize("injection", INJECTIONS)
def test_embeddings_in_place_of_ids(injection):
    model = tiny_model(FAMILY, injection)
    batch = padded(clip_rows(), "left")
    words = model.backbone.get_input_embeddings()(batch.input_ids)
    output = model(inputs_embeds=words, attention_mask=batch.attention_mask)
    real = batch.attention_mask.bool()
    assert_equal(output.last_hidden_state[real], model(**batch.inputs).last_hidden_state[real])
    assert output.pooler_output is None


def test_one_adapter_per_row():
    model = tiny_model(FAMILY, "deep")
    model.add_adapter("long", tiny_prompts("prefix", length=11))
    model.add_adapter("shallow", tiny_prompts("shallow", length=7))
    names = ["shallow", "long", "default", "__base__"]
    rows = clip_rows(5, 2, 7, 4)
    batch = padded(rows, "left")
    with torch.no_grad():
        mixed = model.eval()(**batch.inputs, adapter_names=names)
        for index, (row, name) in enumerate(zip(rows, names, strict=True)):
            alone = _alone(model, row, adapter_names=[name])
            assert_equal(batch.real(mixed.last_hidden_state, index), alone.last_hidden_state[0], name)
            assert_equal(mixed.pooler_output[index], alone.pooler_output[0], name)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_heads_checkpointing_and_saving(tmp_path, injection):
    heads = {"label": HeadConfig("SEQ_CLS", 3, pooling="last"), "tags": HeadConfig("TOKEN_CLS", 2)}
    model = tiny_model(FAMILY, injection, "SEQ_CLS", heads=heads).train()
    batch = padded(clip_rows(), "right")
    labels = torch.tensor([2, 0, 1])
    found = {}
    for name, options in (("plain", StepOptions(unpad=False, last_rows=False)), ("saving", StepOptions(unpad=True))):
        model.step_options = options
        model.zero_grad()
        model(**batch.inputs, task="label", labels=labels).loss.backward()
        found[name] = {n: p.grad.clone() for n, p in model.adapters.named_parameters() if p.grad is not None}
    model.gradient_checkpointing_enable()
    model.zero_grad()
    model(**batch.inputs, task="label", labels=labels).loss.backward()
    found["recomputed"] = {n: p.grad for n, p in model.adapters.named_parameters() if p.grad is not None}
    for name, gradient in found["plain"].items():
        assert_equal(found["saving"][name], gradient, name)
        assert_equal(found["recomputed"][name], gradient, name)
    model.step_options = StepOptions()
    model.eval().requires_grad_(False).save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(tiny_base(FAMILY), tmp_path)
    for task in heads:
        assert_same_bits(loaded(**batch.inputs, task=task).logits, model(**batch.inputs, task=task).logits)


def test_disabled_is_the_bare_model_bit_for_bit():
    model, base = tiny_model(FAMILY, "deep"), tiny_base(FAMILY).requires_grad_(False)
    batch = padded(clip_rows(), "left")
    with torch.no_grad(), model.disable_adapter():
        output, bare = model(**batch.inputs), base(**batch.inputs)
    assert_same_bits(output.last_hidden_state, bare.last_hidden_state)
    assert_same_bits(output.pooler_output, bare.pooler_output)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_no_tensor_of_p_plus_n_rows(injection):
    tokens, length = 13, 10
    model = tiny_model(FAMILY, injection, length=length).train()
    total = tokens + length
    audit = ShapeAudit(
        total, 3 * total, allowed=lambda s: len(s) == 4 and (s[1:] == (HEADS, total, HIDDEN // HEADS) or s[3] == total)
    )
    batch = padded(clip_rows(9, 4, 13), "left", width=tokens)
    with audit:
        model(**batch.inputs, output_hidden_states=True).last_hidden_state.sum().backward()
    assert audit.hits == [] and audit.calls["mm"] + audit.calls["addmm"] > 10


@pytest.mark.parametrize("injection", INJECTIONS)
def test_prompts_start_as_the_states_of_a_text(injection):
    base, tokenizer = tiny_base(FAMILY), tiny_tokenizer(causal=True)
    config = PTuningV2Config("FEATURE_EXTRACTION", 4, injection=injection, prompt_init="text")
    text = "anna likes paris very"
    model = get_ptv2_model(base, config, tokenizer=tokenizer, init_text=text).eval()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids.shape == (1, 4) and int(ids.max()) < VOCABULARY
    prompts = model.adapters["default"].encoder.prompts
    bare = tiny_base(FAMILY)(input_ids=ids, output_hidden_states=True)
    if injection == "shallow":
        assert_equal(prompts, bare_words(ids))
        # As the words themselves stand in front of the text, so does the prompt.
        row = clip_rows(6)[0][None]
        whole = tiny_base(FAMILY)(input_ids=torch.cat([ids, row], dim=1)).last_hidden_state
        assert_equal(model(input_ids=row).last_hidden_state, whole[:, 4:])
    elif injection == "deep":
        for layer in range(2):
            assert_equal(prompts[layer], bare.hidden_states[layer][0])
    else:
        attention = tiny_base(FAMILY).encoder.layers[0]
        values = attention.self_attn.v_proj(attention.layer_norm1(bare.hidden_states[0][0]))
        assert_equal(prompts[0, 1], values.unflatten(-1, (HEADS, -1)).transpose(0, 1))


def bare_words(ids):
    return tiny_base(FAMILY).embeddings.token_embedding(ids)[0]


def test_texts_past_the_position_table_are_refused():
    model = tiny_model(FAMILY, "shallow")
    ids = torch.full((1, 60), 5)
    with pytest.raises(ValueError, match="within the model's 64 learned positions; .* come to 65"):
        model(input_ids=ids)
    assert model(input_ids=ids[:, :59]).last_hidden_state.shape == (1, 59, HIDDEN)
    assert tiny_model(FAMILY, "deep")(input_ids=torch.full((1, 64), 5)).last_hidden_state.shape == (1, 64, HIDDEN)
