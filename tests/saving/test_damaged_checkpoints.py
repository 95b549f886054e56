"""What a damaged or a dishonest file says is found out, before it costs anything, and is refused by its name."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptv2_fast import HeadConfig, PTuningV2Model, from_paper, from_peft
from ptv2_fast.saving.checkpoint import TRAINER_WEIGHTS_NAME, WEIGHTS_NAME, read_description
from ptv2_fast.storage.tensors import read_metadata
from tiny_models import tiny_base, tiny_model
from tolerances import assert_same_bits

HEADS = {"topic": HeadConfig("SEQ_CLS", 3, labels=["a", "b", "c"])}
DEEP = "[" * 100_000 + "]" * 100_000


def _base():
    return tiny_base("bert", "SEQ_CLS")


def _saved(folder, **config):
    model = tiny_model("bert", "deep", "SEQ_CLS", **{"heads": HEADS, **config})
    model.save_pretrained(folder)
    return model


def _rewrite(folder, text=None, tensors=None, **changes):
    """Replace the description or tensors of the weights file, without a checksum as earlier versions wrote it."""
    path = folder / WEIGHTS_NAME
    if text is None:
        text = json.dumps({**json.loads(read_metadata(path)["ptv2"]), **changes})
    save_file({**load_file(path), **(tensors or {})}, path, metadata={"ptv2": text})


def _refused(folder, message, error=ValueError):
    base = _base()
    with pytest.raises(error, match=message) as caught:
        PTuningV2Model.from_pretrained(base, folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert base.config._attn_implementation == "sdpa" and all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("peft", [False, True], ids=["ours", "peft"])
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, peft):
    if peft:
        tiny_model("llama", "prefix", "CAUSAL_LM").save_pretrained(tmp_path, format="peft")
        path = tmp_path / "adapter_model.safetensors"
        load = lambda: from_peft(tiny_base("llama", "CAUSAL_LM"), tmp_path)  # noqa: E731
    else:
        _saved(tmp_path)
        path = tmp_path / WEIGHTS_NAME
        load = lambda: PTuningV2Model.from_pretrained(_base(), tmp_path)  # noqa: E731
    whole, draws, noticed, expected = path.read_bytes(), random.Random(0), 0, load()
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load()
        except ValueError as error:
            noticed += str(path) in str(error)
            continue
        assert loaded.ptv2_config == expected.ptv2_config
        for name, tensor in expected.adapters["default"].state_dict().items():
            assert_same_bits(loaded.adapters["default"].state_dict()[name], tensor, name)
    assert noticed > 135


KINDS = {
    "int8": lambda t: (t * 10).to(torch.int8),
    "int64": lambda t: (t * 10).long(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_other_kinds_are_not_cast(tmp_path, kind):
    cast = KINDS[kind]
    model = _saved(tmp_path)
    prompts = cast(model.adapters["default"].encoder.prompts.detach())
    _rewrite(tmp_path, tensors={"encoder.prompts": prompts})
    message = f"encoder.prompts must be of floating point.*got {prompts.dtype}"
    _refused(tmp_path, message)
    with pytest.raises(ValueError, match=message):
        tiny_model("bert", "deep", "SEQ_CLS", heads=HEADS).load_adapter(tmp_path, "other")
    state = {**model.state_dict(), "adapters.default.encoder.prompts": prompts}
    before = model.adapters["default"].encoder.prompts.clone()
    with pytest.raises(RuntimeError, match="encoder.prompts is torch"):
        model.load_state_dict(state)
    assert_same_bits(model.adapters["default"].encoder.prompts, before)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "new", state_dict=state)
    (tmp_path / "checkpoint").mkdir()
    save_file(state, tmp_path / "checkpoint" / TRAINER_WEIGHTS_NAME)
    _refused(tmp_path / "checkpoint", message)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("injection", ["prefix", "shallow"])
def test_tensors_of_other_kinds_in_the_files_of_peft(tmp_path, kind, injection):
    tiny_model("llama", injection, "CAUSAL_LM").save_pretrained(tmp_path, format="peft")
    path = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": KINDS[kind](load_file(path)["prompt_embeddings"])}, path)
    with pytest.raises(ValueError, match="must be of floating point"):
        from_peft(tiny_base("llama", "CAUSAL_LM"), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mlp", [False, True])
def test_tensors_of_other_kinds_in_the_paper_s_files(kind, mlp):
    base = tiny_base("bert", "TOKEN_CLS")
    state = {"prefix_encoder.embedding.weight": torch.randn(4, 2 * 2 * 32)}
    if mlp:
        state = {
            "prefix_encoder.embedding.weight": torch.randn(4, 32),
            "prefix_encoder.trans.0.weight": torch.randn(6, 32), "prefix_encoder.trans.0.bias": torch.randn(6),
            "prefix_encoder.trans.2.weight": torch.randn(128, 6), "prefix_encoder.trans.2.bias": torch.randn(128),
        }  # fmt: skip
    state = {name: KINDS[kind](tensor) for name, tensor in state.items()}
    state |= {name: tensor for name, tensor in base.state_dict().items() if name.startswith("classifier")}
    for trainable in (False, True):
        with pytest.raises(ValueError, match="must be of floating point"):
            from_paper(base, state, is_trainable=trainable)


def test_what_is_no_tensor_in_the_paper_s_state():
    with pytest.raises(ValueError, match="must be of floating point, 16 bits or more; got str"):
        from_paper(tiny_base("bert", "TOKEN_CLS"), {"prefix_encoder.embedding.weight": "x"})


def test_a_mlp_of_the_paper_is_measured_before_it_is_multiplied():
    base = tiny_base("bert", "TOKEN_CLS")
    rows = 100_000  # rows times rows are 40 GB
    state = {
        "prefix_encoder.embedding.weight": torch.zeros(rows, 32),
        "prefix_encoder.trans.0.weight": torch.zeros(1, 32), "prefix_encoder.trans.0.bias": torch.zeros(1),
        "prefix_encoder.trans.2.weight": torch.zeros(rows, 1), "prefix_encoder.trans.2.bias": torch.zeros(rows),
    }  # fmt: skip
    with pytest.raises(ValueError, match="keys and values"):
        from_paper(base, state)


@pytest.mark.parametrize(
    "config",
    [
        {"heads": {"topic": {"task_type": "SEQ_CLS", "num_labels": 10**12}}},
        {"heads": {"topic": {"task_type": "SEQ_CLS", "num_labels": 10**30}}},
        {"heads": {"topic": {"task_type": "SEQ_CLS", "num_labels": 3}, "more": 10**12}},
        {"num_virtual_tokens": 1 << 17},
        {"reparameterization": 10**12},
        {"reparameterization": 10**30},
        {"injection": "prefix", "prompt_init": "gated"},
        {"layers": [10**30]},
        {"position_offset": 10**30},
        {"position_offset": 10**9},
        {"init_std": 10**400},
        {"prompt_dropout": 10**400},
    ],
    ids=str,
)
def test_what_a_description_claims_is_compared_with_the_file_first(tmp_path, config, monkeypatch):
    _saved(tmp_path)
    before = read_description(tmp_path)["config"]
    _rewrite(tmp_path, config={**before, "heads": {"topic": {"task_type": "SEQ_CLS", "num_labels": 3}}, **config})
    allocated = []
    real = torch.randn

    def counted(*shape, **options):
        made = real(*shape, **options)
        allocated.append(0 if made.is_meta else made.numel())
        return made

    monkeypatch.setattr(torch, "randn", counted)
    if config != {"position_offset": 10**9}:
        _refused(tmp_path, "must|missing|no tensors can have|unusable")
        assert sum(allocated) == 0
        return
    # A base with a table of positions refuses it when a text comes.
    loaded = PTuningV2Model.from_pretrained(_base(), tmp_path)
    with pytest.raises(ValueError):
        loaded(input_ids=torch.tensor([[3, 4]]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nested too deeply"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
        ("{", "not JSON"),
        ("9" * 5000, "not JSON|no ptv2_fast description"),
        ("[]", "no ptv2_fast description"),
        ("null", "no ptv2_fast description"),
        ('{"format_version": 1, "adapter_name": "\\ud800", "base": {}, "config": {}}', "half a surrogate pair"),
        ('{"format_version": 1, "adapter_name": "a", "base": {"x": "\\udfff"}, "config": {}}', "half a surrogate pair"),
        ('{"format_version": [1], "adapter_name": "a", "base": {}, "config": {}}', r"format_version \[1\]"),
        ('{"format_version": 1, "adapter_name": ["a"], "base": {}, "config": {}}', "unusable name"),
    ],
)
def test_descriptions_that_cannot_be_read(tmp_path, text, message):
    _saved(tmp_path)
    _rewrite(tmp_path, text=text)
    _refused(tmp_path, message)
    with pytest.raises(ValueError, match=message):
        read_description(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"task_type": "SEQ_CLS", "heads": {"x": {"num_labels": 3, "labels": 5}}}},
        {"config": {"task_type": "SEQ_CLS", "heads": {"x": {"labels": ["a"]}}}},
        {"config": {"task_type": ["SEQ_CLS"]}},
        {"config": {"task_type": "SEQ_CLS", "stacks": [["encoder"]]}},
        {"config": {"task_type": "SEQ_CLS", "layers": [[0]]}},
        {"config": {"task_type": "SEQ_CLS", "layers": [99]}},
        {"config": {"task_type": "SEQ_CLS", "init_std": float("nan")}},
        {"config": {"task_type": "SEQ_CLS", "heads": {"x": {"task_type": {}, "num_labels": 3}}}},
        {"config": {"task_type": "CAUSAL_LM"}},
        {"base": {}},
    ],
    ids=str,
)
def test_descriptions_that_say_what_cannot_be(tmp_path, change):
    _saved(tmp_path)
    _rewrite(tmp_path, **change)
    _refused(tmp_path, ".")


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.frombuffer(bytearray(b"[]"), dtype=torch.uint8), "describes no adapter"),
        (torch.frombuffer(bytearray(b"[5]"), dtype=torch.uint8), "no ptv2_fast description"),
        (torch.frombuffer(bytearray(b"null"), dtype=torch.uint8), "no ptv2_fast description"),
        (torch.frombuffer(bytearray(b"\xff\xfe{"), dtype=torch.uint8), "JSON"),
        (torch.frombuffer(bytearray(DEEP.encode()), dtype=torch.uint8), "nested too deeply"),
        (torch.ones(3), "as bytes; got torch.float32"),
        (torch.ones(3, 2, dtype=torch.uint8), r"as bytes; got torch.uint8 \(3, 2\)"),
        (torch.tensor(3, dtype=torch.uint8), "as bytes"),
        (torch.zeros(0, dtype=torch.uint8), "JSON"),
    ],
)
def test_descriptions_of_a_trainer_s_checkpoint(tmp_path, packed, message):
    state = tiny_model("bert", "deep", "SEQ_CLS", heads=HEADS).state_dict()
    save_file({**state, "ptv2_description": packed}, tmp_path / TRAINER_WEIGHTS_NAME)
    _refused(tmp_path, message)


def test_a_trainer_s_checkpoint_that_does_not_fit_its_description(tmp_path):
    model = tiny_model("bert", "deep", "SEQ_CLS", heads=HEADS)
    path = tmp_path / TRAINER_WEIGHTS_NAME
    save_file({**model.state_dict(), "adapters.other.encoder.prompts": torch.ones(2)}, path)
    _refused(tmp_path, "tensors of no adapter.*adapters.other.encoder.prompts")
    description = json.loads(bytes(model.state_dict()["ptv2_description"].tolist()))
    twice = torch.frombuffer(bytearray(json.dumps(description * 2).encode()), dtype=torch.uint8)
    save_file({**model.state_dict(), "ptv2_description": twice}, path)
    _refused(tmp_path, "two adapters named 'default'")


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        '{"peft_type": "\\ud800"}',
        "[]",
        '{"peft_type": ["PREFIX_TUNING"]}',
        '{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": true}',
        '{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 1e9}',
        '{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 1000000000}',
    ],
)
def test_descriptions_of_peft(tmp_path, text):
    tiny_model("llama", "prefix", "CAUSAL_LM").save_pretrained(tmp_path, format="peft")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path)):
        from_peft(tiny_base("llama", "CAUSAL_LM"), tmp_path)
