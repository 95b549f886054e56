"""Bases whose layers are quantized or have LoRA beside them: the layers themselves make a prompt's keys and values."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch import nn

from batches import padded, text_rows
from ptv2_fast import PTuningV2Model, StepOptions, get_ptv2_model
from ptv2_fast.families.registry import family_of
from ptv2_fast.prompts.projection import LayerProjections
from ptv2_fast.step.fused_projections import FusedProjections
from tiny_models import INJECTIONS, LABELS, literal_states, tiny_base, tiny_prompts
from tolerances import assert_differs, assert_equal

# Groups of weights share a scale, and a group needs as many inputs.
SIZES = {"hidden_size": 64, "intermediate_size": 64}
BATCH = padded(text_rows(), "right")
REAL = BATCH.attention_mask.bool()
AUTO = {
    "FEATURE_EXTRACTION": transformers.AutoModel,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
}


def _torchao(name: str, kept: list[str] | None):
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
        ),
        "float8": lambda: quantization.Float8WeightOnlyConfig(),
    }
    return transformers.TorchAoConfig(config[name](), modules_to_not_convert=kept)


def _bitsandbytes(bits: int, kept: list[str] | None):
    pytest.importorskip("bitsandbytes")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    # Outliers are looked for in all rows together, and the literal form has other rows.
    eight = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    return transformers.BitsAndBytesConfig(**four if bits == 4 else eight, llm_int8_skip_modules=kept)


KINDS = {
    "torchao-int8": functools.partial(_torchao, "int8"),
    "torchao-int4": functools.partial(_torchao, "int4"),
    "torchao-float8": functools.partial(_torchao, "float8"),
    "bitsandbytes-8": functools.partial(_bitsandbytes, 8),
    "bitsandbytes-4": functools.partial(_bitsandbytes, 4),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """(family, task, kind) -> a base as a user would load it."""
    folders = {}

    def load(family: str, task: str, kind: str, kept: list[str] | None = None):
        config = KINDS[kind](kept)
        if (family, task) not in folders:
            folders[family, task] = tmp_path_factory.mktemp(family)
            changes = SIZES if family != "gpt2" else {"hidden_size": 64}
            tiny_base(family, task, **changes).save_pretrained(folders[family, task])
        base = (
            AUTO[task]
            .from_pretrained(folders[family, task], quantization_config=config, dtype=torch.float32, device_map="cpu")
            .eval()
        )
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # Where the CPU has it, bitsandbytes packs weights in evaluation for a product without a gradient.
                module.support_avx512bf16_for_cpu = False
        return base

    return load


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _assert_is_literal(base) -> None:
    """Deep prompts over a base equal their literal form over the same base, and train."""
    torch.manual_seed(3)
    model = get_ptv2_model(base, tiny_prompts("deep"))
    found = model(**BATCH.inputs).last_hidden_state
    expected = literal_states(model, model.backbone, **BATCH.inputs)
    assert_equal(found[REAL], expected[REAL], "states")
    prompts = model.adapters["default"].encoder.prompts
    weights = torch.randn_like(found[REAL])
    grads = [torch.autograd.grad((states[REAL] * weights).sum(), prompts)[0] for states in (found, expected)]
    assert_equal(*grads, "gradient")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "llama", "phi3", "gpt_neox", "gpt2"])
def test_deep_prompts_are_what_the_quantized_layers_make_of_them(family, kind, quantized):
    base = quantized(family, "FEATURE_EXTRACTION", kind)
    if family == "gpt2" and kind.startswith("torchao"):
        pytest.skip("torchao leaves transformers' Conv1D as it is")
    assert not any(_is_plain(m) for m in base.modules()), "nothing is quantized"
    _assert_is_literal(base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "task"), [("bert", "TOKEN_CLS"), ("llama", "CAUSAL_LM")])
def test_a_quantized_base_trains_evaluates_and_saves(family, task, kind, quantized, tmp_path):
    kept = ["classifier"] if task == "TOKEN_CLS" else None
    base = quantized(family, task, kind, kept)
    before = {name: value.clone() for name, value in base.state_dict().items() if isinstance(value, torch.Tensor)}
    torch.manual_seed(3)
    model = get_ptv2_model(base, tiny_prompts("deep", task)).train()
    model.step_options = StepOptions(unpad=True, labelled_rows_loss=True, fused_projections=True, last_rows=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    labels = (BATCH.input_ids % LABELS).masked_fill(~REAL, -100)
    losses, logits = [], []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**BATCH.inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            logits.append(model.eval()(**BATCH.inputs).logits)
        model.train()
    assert losses[-1] < losses[0] - 0.05
    assert_differs(logits[-1], logits[-2], "logits of the next step")
    for name, value in base.state_dict().items():
        assert name not in before or torch.equal(_dense(value), _dense(before[name])), name
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(quantized(family, task, kind, kept), tmp_path)
    assert_equal(loaded(**BATCH.inputs).logits[REAL], logits[-1][REAL], "logits")


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_head_is_no_head_to_train(kind, quantized):
    base = quantized("bert", "TOKEN_CLS", kind, ["query"])
    with pytest.raises(ValueError, match="'classifier' is quantized .*modules_to_not_convert"):
        get_ptv2_model(base, tiny_prompts("deep", "TOKEN_CLS"))


def _dense(value: torch.Tensor) -> torch.Tensor:
    plain = type(value) in (torch.Tensor, nn.Parameter) or not hasattr(type(value), "dequantize")
    return value if plain else value.dequantize()


@pytest.mark.parametrize("injection", INJECTIONS)
def test_a_quantized_base_takes_every_injection(injection, quantized):
    base = quantized("llama", "FEATURE_EXTRACTION", "torchao-int8")
    model = get_ptv2_model(base, tiny_prompts(injection))
    found = model(**BATCH.inputs).last_hidden_state
    assert_equal(found[REAL], literal_states(model, model.backbone, **BATCH.inputs)[REAL], "states")


def test_nothing_takes_the_weights_of_quantized_layers_for_plain_ones(quantized):
    base = quantized("llama", "FEATURE_EXTRACTION", "torchao-int8")
    assert len(FusedProjections(base)) == 0 < len(FusedProjections(tiny_base("llama").requires_grad_(False)))
    # The kernel of the triton backend reads weights by their addresses.
    project, states = LayerProjections(base, family_of(base), (0, 1)), torch.randn(2, 5, 64)
    for found, expected in zip(project(states, "triton"), project(states, "torch"), strict=True):
        assert_equal(torch.stack(found), torch.stack(expected), "keys and values")


@pytest.mark.parametrize(("family", "targets"), [("llama", ["k_proj", "v_proj"]), ("gpt2", ["c_attn"])])
def test_lora_beside_the_projections_is_part_of_the_base(family, targets):
    peft = pytest.importorskip("peft")
    base = tiny_base(family)
    torch.manual_seed(1)
    plain = base(**BATCH.inputs).last_hidden_state
    base.add_adapter(peft.LoraConfig(target_modules=targets, init_lora_weights=False, fan_in_fan_out=family == "gpt2"))
    assert_differs(base.eval()(**BATCH.inputs).last_hidden_state, plain, "LoRA")
    _assert_is_literal(base)
