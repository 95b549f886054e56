"""Checkpoints of the P-Tuning v2 paper's code run here as they run there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForMultipleChoice, DynamicCache

from batches import padded, text_rows
from peft_models import said
from ptv2_fast import from_paper
from ptv2_fast.inputs.cache import CACHE
from tiny_models import HIDDEN, LABELS, tiny_base, tiny_config
from tolerances import assert_differs, assert_equal

LENGTH, WIDTH, LAYERS, HEADS = 4, 6, 2, 4
RIGHT = padded(text_rows(), "right")


def _state(*, projection=False, head=None, labels=LABELS, **tensors):
    """A state dict as the code's Trainer saves it, without the frozen model."""
    width = LAYERS * 2 * HIDDEN
    state = {"prefix_encoder.embedding.weight": torch.randn(LENGTH, HIDDEN if projection else width)}
    if projection:
        for index, layer in [(0, nn.Linear(HIDDEN, WIDTH)), (2, nn.Linear(WIDTH, width))]:
            state |= {f"prefix_encoder.trans.{index}.{n}": 3 * t for n, t in layer.state_dict().items()}
    if head:
        state |= {f"{head}.weight": torch.randn(labels, HIDDEN), f"{head}.bias": torch.randn(labels)}
    return {**state, **tensors}


@torch.no_grad()
def _literal(base, state, batch=RIGHT):
    """The code's forward up to its head: (states (B, N, D), the pooler's output)."""
    rows = batch.input_ids.shape[0]
    past = state["prefix_encoder.embedding.weight"].expand(rows, -1, -1)
    if "prefix_encoder.trans.0.weight" in state:
        past = past @ state["prefix_encoder.trans.0.weight"].T + state["prefix_encoder.trans.0.bias"]
        past = torch.tanh(past) @ state["prefix_encoder.trans.2.weight"].T + state["prefix_encoder.trans.2.bias"]
    past = past.view(rows, LENGTH, LAYERS * 2, HEADS, HIDDEN // HEADS)
    pairs = past.permute(2, 0, 3, 1, 4).split(2)
    backbone = base.base_model
    mask = torch.cat([torch.ones(rows, LENGTH, dtype=torch.long), batch.attention_mask], dim=1)
    positions = torch.arange(batch.input_ids.shape[1]).expand(rows, -1) + LENGTH
    if backbone.config.model_type == "roberta":
        positions = positions + backbone.embeddings.padding_idx + 1
    cache = DynamicCache([(keys, values) for keys, values in pairs])
    output = backbone(batch.input_ids, attention_mask=mask, position_ids=positions, **{CACHE: cache})
    return output.last_hidden_state, output.get("pooler_output")


def _linear(states, state, head):
    return states @ state[f"{head}.weight"].T + state[f"{head}.bias"]


def _real(logits):
    return torch.cat([RIGHT.real(logits, row) for row in range(len(logits))])


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "mlp"])
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_tags(family, is_trainable, projection):
    base, state = tiny_base(family, "TOKEN_CLS"), _state(projection=projection, head="classifier")
    expected = _real(_linear(_literal(base, state)[0], state, "classifier"))
    bare = said(base, RIGHT, "TOKEN_CLS")
    model = from_paper(base, state, is_trainable=is_trainable)
    model.eval()
    assert_equal(said(model, RIGHT, "TOKEN_CLS"), expected)
    assert_differs(expected, bare)
    config = model.ptv2_config["default"]
    assert (config.injection, config.num_virtual_tokens, config.position_offset) == ("prefix", LENGTH, LENGTH)
    keeps_mlp = projection and is_trainable
    assert config.reparameterization == (WIDTH if keeps_mlp else None)
    trains = {name for name, p in model.adapters["default"].named_parameters() if p.requires_grad}
    assert ("encoder.mlp.0.weight" in trains) == keeps_mlp and ("base_heads.classifier.bias" in trains) == is_trainable


def test_rows_of_text_by_berts_pooler(tmp_path):
    """Out of a file with the frozen model in it."""
    base, state = tiny_base("bert", "SEQ_CLS"), _state(head="classifier")
    expected = _linear(_literal(base, state)[1], state, "classifier")
    frozen = {f"bert.{name}": tensor.clone() for name, tensor in base.base_model.state_dict().items()}
    save_file({**state, **frozen}, tmp_path / "model.safetensors")
    for checkpoint in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        model = from_paper(tiny_base("bert", "SEQ_CLS"), checkpoint, adapter_name="rte")
        assert_equal(said(model, RIGHT, "SEQ_CLS", adapter_names=["rte"] * 3), expected)


def test_rows_of_text_by_robertas_pooler():
    """transformers has that pooler in its head, and the base's own head is another one."""
    base = tiny_base("roberta", "SEQ_CLS")
    dense = nn.Linear(HIDDEN, HIDDEN)
    pooler = {f"roberta.pooler.dense.{name}": tensor for name, tensor in dense.state_dict().items()}
    state = _state(head="classifier", **pooler)
    pooled = torch.tanh(_linear(_literal(base, state)[0][:, 0], pooler, "roberta.pooler.dense"))
    expected = _linear(pooled, state, "classifier")
    assert_equal(said(from_paper(base, state), RIGHT, "SEQ_CLS"), expected)
    without = {name: tensor for name, tensor in state.items() if name not in pooler}
    with pytest.raises(ValueError, match=r"lacks roberta.pooler.dense.weight: RobertaForSequenceClassification has"):
        from_paper(tiny_base("roberta", "SEQ_CLS"), without)


def test_answers():
    base, state = tiny_base("bert", "QUESTION_ANS"), _state(head="qa_outputs", labels=2)
    expected = _real(_linear(_literal(base, state)[0], state, "qa_outputs"))
    assert_equal(said(from_paper(base, state), RIGHT, "QUESTION_ANS"), expected)


def test_a_backbone_takes_the_prefix_alone():
    base, state = tiny_base("bert"), _state(head="classifier")
    expected = _real(_literal(base, state)[0])
    assert_equal(said(from_paper(base, state), RIGHT, "FEATURE_EXTRACTION"), expected)


def _refused(message, checkpoint, base=None, **arguments):
    base = tiny_base("bert", "TOKEN_CLS") if base is None else base
    with pytest.raises(ValueError, match=message):
        from_paper(base, checkpoint, **arguments)
    assert base.config._attn_implementation == "sdpa", "the base was touched"


def test_states_that_are_none():
    state = _state(head="classifier")
    _refused("it is no checkpoint of the P-Tuning v2 paper's code", {"classifier.weight": torch.zeros(1)})
    _refused("through the embeddings twice", {**state, "prefix_encoder.weight": torch.zeros(LENGTH, HIDDEN)})
    _refused("task_type must be one of", state, task_type="TAGS")
    with pytest.raises(ValueError, match="base must be a transformers PreTrainedModel; got Linear"):
        from_paper(nn.Linear(1, 1), state)


def test_another_base():
    message = "was trained on another base"
    _refused(message, _state(head="classifier"), tiny_base("bert", "TOKEN_CLS", num_hidden_layers=3))
    _refused(message, _state(projection=True, head="classifier"), tiny_base("bert", "TOKEN_CLS", hidden_size=64))
    projected = _state(projection=True, head="classifier")
    _refused(message, projected, tiny_base("bert", "TOKEN_CLS", num_hidden_layers=3))
    _refused(r"lacks prefix_encoder.trans.2.bias", {k: t for k, t in projected.items() if k[-8:] != "s.2.bias"})


def test_heads_that_do_not_fit():
    _refused(r"unknown \['qa_outputs.bias', 'qa_outputs.weight'\]", _state(head="qa_outputs"))
    _refused("classifier.bias must have shape|classifier.weight must have shape", _state(head="classifier", labels=5))


def test_files(tmp_path):
    _refused("nowhere does not exist", tmp_path / "nowhere")
    _refused("model.safetensors does not exist", tmp_path)
    torch.save(_state(head="classifier"), tmp_path / "pytorch_model.bin")
    _refused("pytorch_model.bin is a pickle", tmp_path)
    _refused("pytorch_model.bin is a pickle", tmp_path / "pytorch_model.bin")
    whole = tmp_path / "model.safetensors"
    save_file(_state(head="classifier"), whole)
    whole.write_bytes(whole.read_bytes()[:-1])
    _refused("model.safetensors is not a whole safetensors file", tmp_path)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_choices(family):
    """BertPrefixForMultipleChoice and its like: the pooler's output, one score, the rows of an example side by side."""
    torch.manual_seed(0)
    base = AutoModelForMultipleChoice.from_config(tiny_config(family)).eval()
    batch = padded(text_rows(5, 2, 7, 4), "right")
    state = _state(head="classifier", labels=1)
    expected = _linear(_literal(base, state, batch)[1], state, "classifier").view(2, 2)
    model = from_paper(base, state)
    assert model.ptv2_config["default"].task_type == "MULTIPLE_CHOICE"
    groups = {name: value.unflatten(0, (2, 2)) for name, value in batch.inputs.items()}
    assert_equal(model(**groups).logits, expected)
