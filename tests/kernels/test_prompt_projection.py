"""prompt_projection against one matrix product per layer in float64."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast.kernels.prompt_projection import WeightTable, prompt_projection


def literal(x, weights, biases):
    """One product a layer."""
    return torch.stack(
        [
            torch.nn.functional.linear(layer, weight, None if biases is None else biases[place])
            for place, (layer, weight) in enumerate(zip(x, weights, strict=True))
        ]
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("rows", [1, 17])
def test_matches_a_product_per_layer(device, dtype, budget, transposed, with_bias, rows):
    if device.type == "cuda" and dtype == torch.float16 and (transposed or rows == 1):
        pytest.skip("on a GPU each is two more kernels to compile, and bfloat16's differ in nothing else")
    layers, inner, features = 3, 70, 33
    x = torch.randn(layers, rows, inner, device=device).to(dtype).requires_grad_()
    weights = [torch.randn(features, inner, device=device).to(dtype) for _ in range(layers)]
    if transposed:
        weights = [weight.t().contiguous().t() for weight in weights]
    biases = [torch.randn(features, device=device).to(dtype) for _ in range(layers)] if with_bias else None
    y = prompt_projection(x, weights, biases)
    grad_output = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, grad_output)

    def judged(dtype):
        inputs = x.detach().to(dtype).requires_grad_()
        cast = [weight.to(dtype) for weight in weights], biases and [bias.to(dtype) for bias in biases]
        expected = literal(inputs, *cast)
        return expected, torch.autograd.grad(expected, inputs, grad_output.to(dtype))[0]

    truth, truth_dx = judged(torch.float64)
    baseline, baseline_dx = judged(dtype)
    budget.check("y", y, truth, baseline)
    budget.check("dx", dx, truth_dx, baseline_dx)


def test_views_of_one_weight_and_strided_prompts(device, budget):
    fused = [torch.randn(3 * 32, 48, device=device) for _ in range(2)]
    keys = [weight[32:64] for weight in fused]
    x = torch.randn(5, 2, 48, device=device).transpose(0, 1)
    expected = literal(x.double(), [key.double() for key in keys], None)
    budget.check("y", prompt_projection(x, WeightTable(keys)), expected, None)


def test_weights_that_begin_between_two_vectors(device, budget):
    storage = torch.randn(2, 1 + 8 * 48, device=device)
    weights = [row[1:].view(8, 48) for row in storage]
    table = WeightTable(weights)
    assert not table.aligned and WeightTable([weight.clone() for weight in weights]).aligned
    x = torch.randn(2, 5, 48, device=device)
    expected = literal(x.double(), [weight.double() for weight in weights], None)
    budget.check("y", prompt_projection(x, table), expected, None)


def test_no_prompt(device):
    x = torch.randn(2, 0, 16, device=device, requires_grad=True)
    y = prompt_projection(x, [torch.randn(8, 16, device=device)] * 2)
    assert y.shape == (2, 0, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("x", "weights", "biases", "message"),
    [
        ((3, 4, 16), [(8, 16)] * 2, None, r"x must be \(2, P, 16\)"),
        ((2, 4, 16), [(8, 16), (9, 16)], None, r"weights\[1\] must have the shape"),
        ((2, 4, 16), [(8, 16)] * 2, [(7,)] * 2, "biases must be 2 contiguous tensors"),
        ((2, 4, 16), [(8,)] * 2, None, r"weights must be \(F, D\)"),
    ],
)
def test_refuses(device, x, weights, biases, message):
    made = [torch.zeros(shape, device=device) for shape in weights]
    made_biases = None if biases is None else [torch.zeros(shape, device=device) for shape in biases]
    with pytest.raises(ValueError, match=message):
        prompt_projection(torch.zeros(x, device=device), made, made_biases)
