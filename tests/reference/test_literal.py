"""The literal injections: against Hugging Face's own forward, by hand, and in their invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from ptv2_fast.inputs.cache import CACHE
from ptv2_fast.reference.literal import literal_deep, literal_prefix, literal_shallow

FAMILIES = ["bert", "roberta", "gpt2", "llama", "qwen3"]
CAUSAL = ["gpt2", "llama", "qwen3"]
INJECTIONS = ["deep", "shallow", "prefix"]
P = 3


def _kv_shape(backbone) -> tuple[int, int]:
    config = backbone.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or 32 // config.num_attention_heads


def _prompts(backbone, injection: str, seed: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads, head_dim = _kv_shape(backbone)
    shapes = {
        "deep": [(2, P, 32)],
        "shallow": [(P, 32)],
        "prefix": [(2, num_kv_heads, P, head_dim)] * 2,
    }[injection]
    dtype = backbone.dtype
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )


_LITERAL = {"deep": literal_deep, "shallow": literal_shallow, "prefix": literal_prefix}


def _rotate(keys: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotary by complex numbers: channel j and j + d/2 are one number, turned by its angle."""
    half = keys.shape[-1] // 2
    number = torch.complex(keys[..., :half], keys[..., half:])
    angle = positions[:, None].double() * inv_freq
    turned = number * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _keys_and_values_by_hand(backbone, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Project each layer's prompts as that layer does, (L, Hkv, P, d) each, at -P..-1 if rotary."""
    family = backbone.config.model_type
    heads, head_dim = _kv_shape(backbone)
    keys, values = [], []
    for index, prompt in enumerate(prompts):
        if family in ("bert", "roberta"):
            attention = backbone.encoder.layer[index].attention.self
            key, value = attention.key(prompt), attention.value(prompt)
        elif family == "gpt2":
            block = backbone.h[index]
            _, key, value = block.attn.c_attn(block.ln_1(prompt)).chunk(3, dim=-1)
        else:
            layer = backbone.layers[index]
            normed = layer.input_layernorm(prompt)
            key, value = layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)
        key, value = (x.view(-1, heads, head_dim).transpose(0, 1) for x in (key, value))
        if family == "qwen3":
            key = backbone.layers[index].self_attn.k_norm(key)
        if family in ("llama", "qwen3"):
            key = _rotate(key, torch.arange(-len(prompt), 0), backbone.rotary_emb.inv_freq)
        keys.append(key)
        values.append(value)
    return torch.stack(keys), torch.stack(values)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_right_padded_and_alone_are_the_same(make_backbone, rows, pad, family, injection):
    backbone = make_backbone(family)
    run, prompts = _LITERAL[injection], _prompts(backbone, injection)
    alone = [run(backbone, *prompts, row[None])[0] for row in rows]
    for side in ("left", "right", "holes"):
        batch = pad(rows, side)
        output = run(backbone, *prompts, batch.input_ids, batch.attention_mask)
        assert output.shape == (3, 9, 32)
        for index, expected in enumerate(alone):
            torch.testing.assert_close(batch.real(output, index), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_change_the_output_and_get_true_gradients(make_backbone, rows, pad, family, injection):
    backbone = make_backbone(family)
    run, prompts = _LITERAL[injection], _prompts(backbone, injection)
    batch = pad(rows, "left")
    weights = torch.randn(3, 9, 32, dtype=torch.float64) * batch.attention_mask[..., None]

    def loss(tensors) -> Tensor:
        return (run(backbone, *tensors, batch.input_ids, batch.attention_mask) * weights).sum()

    value = loss(prompts)
    other = _prompts(backbone, injection, seed=6)
    assert abs(value - loss(other)) > 1e-2
    gradients = torch.autograd.grad(value, prompts)
    for gradient in gradients:
        layers = gradient if injection != "shallow" else gradient[None]
        assert all(layer.abs().max() > 1e-4 for layer in layers)
    step = 1e-6
    with torch.no_grad():
        ahead = loss([p + step * (q - p) for p, q in zip(prompts, other, strict=True)])
        behind = loss([p - step * (q - p) for p, q in zip(prompts, other, strict=True)])
    slope = sum((g * (q - p)).sum() for g, p, q in zip(gradients, prompts, other, strict=True))
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-6, atol=1e-6)
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_prompts_deep_and_prefix_are_the_backbone(make_backbone, rows, pad, family):
    backbone = make_backbone(family)
    batch = pad(rows, "right")
    expected = backbone(batch.input_ids, attention_mask=batch.attention_mask)[0]
    heads, head_dim = _kv_shape(backbone)
    nothing = torch.zeros(2, heads, 0, head_dim, dtype=torch.float64)
    outputs = {
        "deep": literal_deep(backbone, nothing.new_zeros(2, 0, 32), *_args(batch)),
        "deep, no layer": literal_deep(backbone, {}, *_args(batch)),
        "prefix": literal_prefix(backbone, nothing, nothing, *_args(batch)),
        "shallow": literal_shallow(backbone, nothing.new_zeros(0, 32), *_args(batch)),
    }
    for name, output in outputs.items():
        for index in range(3):
            torch.testing.assert_close(
                batch.real(output, index),
                batch.real(expected, index),
                rtol=0,
                atol=1e-10,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def _args(batch) -> tuple[Tensor, Tensor]:
    return batch.input_ids, batch.attention_mask


@pytest.mark.parametrize("family", FAMILIES)
def test_shallow_is_the_backbone_on_concatenated_embeddings(make_backbone, rows, pad, family):
    backbone = make_backbone(family)
    (prompts,) = _prompts(backbone, "shallow")
    batch = pad(rows, "right")
    words = backbone.get_input_embeddings()(batch.input_ids)
    joined = backbone(
        inputs_embeds=torch.cat([prompts.expand(3, -1, -1), words], dim=1),
        attention_mask=torch.cat([torch.ones(3, P), batch.attention_mask], dim=1).long(),
    )[0]
    output = literal_shallow(backbone, prompts, *_args(batch))
    for index in range(3):
        expected = batch.real(joined[:, P:], index)
        torch.testing.assert_close(batch.real(output, index), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", CAUSAL)
def test_prefix_on_decoders_is_a_filled_cache(make_backbone, rows, pad, family):
    backbone = make_backbone(family)
    keys, values = _prompts(backbone, "prefix")
    batch = pad(rows, "right")
    cache = DynamicCache(config=backbone.config)
    for index in range(2):
        cache.update(keys[index].expand(3, -1, -1, -1), values[index].expand(3, -1, -1, -1), index)
    expected = backbone(
        batch.input_ids,
        attention_mask=torch.cat([torch.ones(3, P), batch.attention_mask], dim=1).long(),
        position_ids=torch.arange(9).expand(3, -1) + 4,
        use_cache=True,
        **{CACHE: cache},
    )[0]
    output = literal_prefix(backbone, keys, values, *_args(batch), position_offset=4)
    for index in range(3):
        torch.testing.assert_close(batch.real(output, index), batch.real(expected, index), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_deep_is_prefix_with_the_keys_and_values_of_the_prompts(make_backbone, rows, pad, family):
    backbone = make_backbone(family)
    (prompts,) = _prompts(backbone, "deep")
    batch = pad(rows, "left")
    keys, values = _keys_and_values_by_hand(backbone, prompts)
    deep = literal_deep(backbone, prompts, *_args(batch))
    prefix = literal_prefix(backbone, keys, values, *_args(batch))
    for index in range(3):
        torch.testing.assert_close(batch.real(deep, index), batch.real(prefix, index), rtol=0, atol=1e-10)
    one_layer = literal_deep(backbone, prompts[1:], *_args(batch), layers=[1])
    by_index = literal_prefix(backbone, {1: keys[1]}, {1: values[1]}, *_args(batch))
    torch.testing.assert_close(batch.real(one_layer, 0), batch.real(by_index, 0), rtol=0, atol=1e-10)
    assert (batch.real(one_layer, 0) - batch.real(deep, 0)).abs().max() > 1e-3


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_shallow_is_the_prefix_that_the_prompts_alone_leave(make_backbone, rows, pad, family):
    backbone = make_backbone(family)
    (prompts,) = _prompts(backbone, "shallow")
    cache = backbone(inputs_embeds=prompts[None], use_cache=True)[CACHE]
    keys = torch.stack([layer.keys[0] for layer in cache.layers])
    values = torch.stack([layer.values[0] for layer in cache.layers])
    batch = pad(rows, "left")
    shallow = literal_shallow(backbone, prompts, *_args(batch))
    prefix = literal_prefix(backbone, keys, values, *_args(batch), position_offset=P)
    for index in range(3):
        torch.testing.assert_close(batch.real(shallow, index), batch.real(prefix, index), rtol=0, atol=1e-10)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fully_padded_row_is_finite_and_leaves_the_others_alone(make_backbone, rows, pad, family, injection):
    backbone = make_backbone(family)
    run, prompts = _LITERAL[injection], _prompts(backbone, injection)
    batch = pad([rows[0], rows[1][:0]], "right")
    output = run(backbone, *prompts, *_args(batch))
    assert torch.isfinite(output).all()
    alone = run(backbone, *prompts, rows[0][None])[0]
    torch.testing.assert_close(batch.real(output, 0), alone, rtol=0, atol=1e-10)
    for gradient in torch.autograd.grad(output.sum(), prompts):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_the_backbones_own(make_backbone, rows, family, injection):
    backbone = make_backbone(family)
    run, prompts = _LITERAL[injection], _prompts(backbone, injection)
    ids = rows[2][None]
    derived = run(backbone, *prompts, ids)
    own = torch.arange(7)[None] + (2 if family == "roberta" else 0)
    given = run(backbone, *prompts, ids, position_ids=own)
    torch.testing.assert_close(given, derived, rtol=0, atol=0)
    moved = run(backbone, *prompts, ids, position_ids=own + torch.arange(7) // 3)
    assert (moved - derived).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_bias_gates_the_prompts(make_backbone, rows, pad, family):
    backbone = make_backbone(family)
    batch = pad(rows, "left")
    (prompts,) = _prompts(backbone, "deep")
    keys, values = _keys_and_values_by_hand(backbone, prompts)
    bare = literal_deep(backbone, {}, *_args(batch))
    shut = torch.full((2, 4, P), -1e9, dtype=torch.float64)
    half = torch.randn(2, 4, P, dtype=torch.float64)

    def both(bias: Tensor | None) -> list[Tensor]:
        deep = literal_deep(backbone, prompts, *_args(batch), prompt_bias=bias)
        prefix = literal_prefix(backbone, keys, values, *_args(batch), prompt_bias=bias)
        return [batch.real(deep, 2), batch.real(prefix, 2)]

    for output in both(shut):
        torch.testing.assert_close(output, batch.real(bare, 2), rtol=0, atol=1e-10)
    for output, expected in zip(both(torch.zeros_like(half)), both(None), strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    deep, prefix = both(half)
    torch.testing.assert_close(deep, prefix, rtol=0, atol=1e-10)
    assert (deep - both(None)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_token_types_reach_the_text_rows(make_backbone, rows, family):
    backbone = make_backbone(family, type_vocab_size=2)
    ids = rows[2][None]
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    expected = backbone(ids, token_type_ids=types)[0]
    deep = literal_deep(backbone, {}, ids, token_type_ids=types)
    torch.testing.assert_close(deep, expected, rtol=0, atol=1e-10)
    prefix = literal_prefix(backbone, {}, {}, ids, token_type_ids=types)
    torch.testing.assert_close(prefix, expected, rtol=0, atol=1e-10)
    (prompts,) = _prompts(backbone, "shallow")
    joined = torch.cat([prompts[None], backbone.get_input_embeddings()(ids)], dim=1)
    padded = torch.cat([torch.zeros(1, P, dtype=torch.long), types], dim=1)
    expected = backbone(inputs_embeds=joined, token_type_ids=padded)[0][:, P:]
    shallow = literal_shallow(backbone, prompts, ids, token_type_ids=types)
    torch.testing.assert_close(shallow, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_close_to_float64(make_backbone, rows, pad, family, injection):
    batch = pad(rows, "left")
    outputs = []
    for exact in (False, True):
        backbone = make_backbone(family, exact=exact)
        outputs.append(_LITERAL[injection](backbone, *_prompts(backbone, injection), *_args(batch)))
    assert outputs[0].dtype == torch.float32
    real = batch.attention_mask.bool()
    error = (outputs[0][real] - outputs[1][real]).norm() / outputs[1][real].norm()
    assert error < 1e-5


def test_the_backbone_is_left_as_it_was(make_backbone, rows):
    backbone = make_backbone("gpt2")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    for injection in INJECTIONS:
        prompts = _prompts(backbone, injection)
        _LITERAL[injection](backbone, *prompts, rows[0][None]).sum().backward()
        assert backbone.config._attn_implementation == "sdpa"
        with pytest.raises(IndexError):
            _LITERAL[injection](backbone, *prompts, rows[0][None] + 1000)
        assert backbone.config._attn_implementation == "sdpa"
    after = backbone.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not backbone.training


def test_attention_dropout_is_on_in_training_mode_only(make_backbone, rows):
    backbone = make_backbone("bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    (prompts,) = _prompts(backbone, "deep")
    ids = rows[0][None]
    first, second = (literal_deep(backbone, prompts, ids) for _ in range(2))
    assert torch.equal(first, second)
    backbone.train()
    first, second = (literal_deep(backbone, prompts, ids) for _ in range(2))
    assert not torch.allclose(first, second)


IDS = torch.arange(2, 6)[None]


@pytest.mark.parametrize(
    ("family", "call", "message"),
    [
        pytest.param(
            "bert",
            lambda m: literal_deep(m, torch.zeros(3, P, 32), IDS),
            "prompts must have 2 layers on its first axis; got 3",
            id="too-many-layers",
        ),
        pytest.param(
            "bert",
            lambda m: literal_deep(m, torch.zeros(1, P, 32), IDS, layers=[2]),
            r"prompts must be for layers 0\.\.1; got layer 2",
            id="no-such-layer",
        ),
        pytest.param(
            "bert",
            lambda m: literal_deep(m, torch.zeros(2, P, 32), IDS, layers=[1, 1]),
            r"layers must name each layer once; got \[1, 1\]",
            id="a-layer-twice",
        ),
        pytest.param(
            "bert",
            lambda m: literal_deep(m, {0: torch.zeros(P, 32)}, IDS, layers=[0]),
            "layers must be None where prompts is a mapping",
            id="layers-and-mapping",
        ),
        pytest.param(
            "bert",
            lambda m: literal_deep(m, torch.zeros(2, 32), IDS),
            r"prompts must have 2 axes per layer; got \(32,\)",
            id="deep-axes",
        ),
        pytest.param(
            "bert",
            lambda m: literal_shallow(m, torch.zeros(P, 31), IDS),
            r"prompts must be \(prompt length, 32\); got \(3, 31\)",
            id="shallow-width",
        ),
        pytest.param(
            "llama",
            lambda m: literal_prefix(m, torch.zeros(2, 2, P, 16), torch.zeros(2, 2, 4, 16), IDS),
            r"values must have the heads and the length of keys, \(2, 3\); got \(2, 4\)",
            id="prefix-lengths",
        ),
        pytest.param(
            "llama",
            lambda m: literal_prefix(m, {0: torch.zeros(2, P, 16)}, {}, IDS),
            r"values must be given for the layers of keys, \[0\]; got \[\]",
            id="prefix-layers",
        ),
        pytest.param(
            "gpt2",
            lambda m: literal_deep(m, {}, IDS, token_type_ids=IDS),
            "token_type_ids must be None for gpt2",
            id="token-types",
        ),
        pytest.param(
            "gpt2",
            lambda m: literal_deep(m, {}, IDS, position_ids=torch.arange(3)[None]),
            r"position_ids must be \(batch or 1, 4\); got \(1, 3\)",
            id="positions",
        ),
    ],
)
def test_bad_arguments_are_refused(make_backbone, family, call, message):
    with pytest.raises(ValueError, match=message):
        call(make_backbone(family))


def test_other_backbones_are_refused(make_backbone):
    with pytest.raises(ValueError, match="backbone must be one of bert.*got None"):
        literal_deep(torch.nn.Linear(2, 2), {}, IDS)
    with pytest.raises(ValueError, match="must be an encoder; got a bert with is_decoder=True"):
        literal_deep(make_backbone("bert", is_decoder=True), {}, IDS)


def test_gradient_checkpointing_is_refused_in_training_mode_only(make_backbone):
    backbone = make_backbone("llama")
    for module in backbone.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    assert torch.isfinite(literal_deep(backbone, {}, IDS)).all()
    with pytest.raises(ValueError, match="must not use gradient checkpointing"):
        literal_deep(backbone.train(), {}, IDS)


def test_a_model_with_a_head_is_refused(make_backbone):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(make_backbone("llama", exact=False).config)
    with pytest.raises(ValueError, match="without a head.*got LlamaForCausalLM"):
        literal_deep(model, {}, IDS)
