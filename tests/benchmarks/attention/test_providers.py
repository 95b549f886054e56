"""Each provider computes the same function, or says why it cannot."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.attention import flex
from benchmarks.attention.cases import case_of
from benchmarks.attention.inputs import make_inputs
from benchmarks.attention.provider import gradients
from benchmarks.attention.providers import Sdpa, all_providers
from benchmarks.attention.verify import make_judge
from ptv2_fast.kernels import launch, prompt_backward

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = {p.name: p for p in all_providers()}

SHAPES = [
    pytest.param({}, id="plain"),
    pytest.param({"padding": 0.4}, id="padding"),
    pytest.param({"causal": True}, id="causal"),
    pytest.param({"causal": True, "padding": 0.4}, id="causal-padding"),
]


def _judged(case, build, **options):
    inputs = make_inputs(case, CPU)
    call = build(case, inputs)
    out = call.forward()
    grads = gradients(call, out) if case.gradients else ()
    return make_judge(case, inputs, **options).verdict(call.common(out.detach(), grads))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("concat", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("mask", ["prebuilt", "inside", "none"])
def test_every_form_of_sdpa_is_the_same_function(shape, concat, mask):
    """The forced kernels differ from this in the kernel alone, which the run itself judges."""
    if mask == "none" and shape.get("padding") and not shape.get("causal"):
        pytest.skip("not expressible without a mask; refused, see below")
    case = case_of("tiny", 3, 9, 4, dtype="fp32", **shape)
    for backend in (None, SDPBackend.MATH):
        verdict = _judged(case, Sdpa(backend, concat, mask).build)
        assert not verdict.wrong, verdict.reason
        assert len(verdict.errors) == 6


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("build", [flex._build_concat, flex._build_split], ids=["concat", "split"])
def test_flexattention_in_both_forms(shape, build):
    """Uncompiled and forward only: that is what it does on a CPU."""
    case = case_of("tiny", 3, 9, 4, dtype="fp32", direction="forward", **shape)
    verdict = _judged(case, lambda case, inputs: build(case, inputs, compile=lambda function: function))
    assert not verdict.wrong, verdict.reason


def test_the_torch_backend_is_a_provider_everywhere(padded_case):
    assert NAMES["ours_torch"].refuses(padded_case, CPU) is None
    assert not _judged(padded_case, NAMES["ours_torch"].build).wrong


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("cudnn", {"padding": 0.4}, "takes no mask"),
        ("flash", {"padding": 0.4}, "takes no mask"),
        ("efficient", {"padding": 0.4}, "takes no mask"),
        ("cudnn", {"causal": True}, "upper left"),
        ("cudnn_mask", {}, "no mask: no padding"),
        ("sdpa_inside", {}, "no mask to build"),
        ("flash", {"dtype": "fp32"}, "16-bit"),
        ("cudnn_concat", {"dtype": "fp32"}, "16-bit"),
        ("ours_packed", {}, "no padding"),
        ("ours_prefix", {"direction": "forward"}, "backward only"),
        ("ours_bank16", {}, "fewer rows"),
        ("ours_by_gradient", {"direction": "forward"}, "backward only"),
    ],
)
def test_why_a_provider_cannot_serve_a_case(name, shape, reason):
    assert reason in NAMES[name].refuses(case_of("roberta-large", 8, 64, 8, **shape), CUDA)


@pytest.mark.parametrize("name", ["ours_prefix", "ours_bank16", "flex_split"])
def test_without_a_prompt_there_is_nothing_to_compare(name):
    assert "no prompt" in NAMES[name].refuses(case_of("roberta-large", 16, 64, 0), CUDA)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cudnn", {}), ("cudnn_concat", {}), ("cudnn_mask", {"padding": 0.4}), ("flash", {"causal": True}),
        ("flash", {"causal": True, "padding": 0.4}), ("efficient", {}), ("efficient_mask", {"causal": True}),
        ("sdpa_user", {}), ("sdpa_outside", {"causal": True}), ("flex_concat", {}), ("flex_split", {}),
    ],
)  # fmt: skip
def test_who_serves_what_on_a_gpu(name, shape):
    assert NAMES[name].refuses(case_of("roberta-large", 16, 64, 8, **shape), CUDA) is None


def test_forced_kernels_and_flexattention_need_a_gpu():
    case = case_of("roberta-large", 16, 64, 8, causal=True, padding=0.4)
    for name, provider in NAMES.items():
        if name.startswith(("cudnn_", "flash", "efficient_", "flex")):
            assert "needs a CUDA device" in provider.refuses(case, CPU), name


def test_every_provider_states_its_call():
    assert len(NAMES) == len(all_providers())
    assert all(len(provider.call) > 20 for provider in NAMES.values())


def test_rows_are_computed_gradient_by_gradient_on_request_alone():
    """What is timed beside ours must not be ours: another choice, and another memory of repeated calls."""
    usual, chosen = launch.choose_config, prompt_backward.is_chosen
    provider = NAMES["ours_by_gradient"]
    assert "more than 128 tokens: 129" in provider.refuses(case_of("roberta-large", 8, 129, 8), CPU)
    with provider.around():
        assert not prompt_backward.is_chosen(None, None, 0)
        assert launch.choose_config != usual
        assert launch.choose_config(90, 64, torch.bfloat16, "forward") == usual(90, 64, torch.bfloat16, "forward")
    assert (launch.choose_config, prompt_backward.is_chosen) == (usual, chosen)
