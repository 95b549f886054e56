"""A layer's attention is `prompt_attention` in another layout: same numbers, same gradients, same refusals."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast.attention import prompt_attention
from ptv2_fast.attention.layer import layer_attention
from ptv2_fast.attention.prompt_batch import Account, LayerPrompt, PromptBatch
from tolerances import assert_equal, assert_same_bits

B, H, KV, N, D, P = 2, 4, 2, 20, 16, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "torch"]
OPTIONS = {"index": None, "key_mask": None, "bias": None, "causal": False, "scale": None, "dropout_p": 0.0,
           "window": None, "softcap": None}  # fmt: skip


def _states(tokens: int = N) -> list[torch.Tensor]:
    return [torch.randn(B, tokens, heads, D, device=DEVICE).transpose(1, 2).requires_grad_() for heads in (H, KV, KV)]


def _prompt(*bank: int, bias: bool = False) -> LayerPrompt:
    keys, values = (torch.randn(*bank, KV, P, D, device=DEVICE, requires_grad=True) for _ in range(2))
    gate = torch.randn(*bank, H, P, device=DEVICE, requires_grad=True) if bias else None
    return LayerPrompt(keys, values, gate)


def _packed(states: torch.Tensor) -> torch.Tensor:
    return states.transpose(1, 2).flatten(0, 1)


CASES = {
    "plain": {},
    "causal": {"causal": True, "window": 7, "softcap": 5.0, "scale": 0.5},
    "mask": {"key_mask": (torch.arange(N) < torch.tensor([[N], [4]])).to(DEVICE)},
    "dropout": {"dropout_p": 0.3},
    "bias": {"bias": torch.randn(1, H, N, N, device=DEVICE), "gated": True},
    "bank": {"index": torch.tensor([2, 0], device=DEVICE), "gated": True},
    "packed": {"bounds": [0, 5, 30, 40]},
    "packed bank": {"bounds": [0, 5, 30, 40], "index": torch.tensor([1, 1, 0], device=DEVICE), "causal": True},
    "few queries": {"tokens": 1},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_prompt_attention(name, backend):
    case = dict(CASES[name])
    bounds, states = case.pop("bounds", None), _states(case.pop("tokens", N))
    bank = (3,) if "index" in case else ()
    prompt, options = _prompt(*bank, bias=case.pop("gated", False)), {**OPTIONS, **case}
    rows = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    batch = PromptBatch((prompt,), cu_seqlens=rows, max_seqlen=None if rows is None else 25, backend=backend)
    leaves = [*states, prompt.keys, prompt.values, *([] if prompt.bias is None else [prompt.bias])]

    def ours():
        return layer_attention(*states, prompt, batch, **options)

    def theirs():
        given = [x if rows is None else _packed(x) for x in states]
        others = {key: value for key, value in options.items() if key != "index"}
        out = prompt_attention(
            *given,
            prompt.keys,
            prompt.values,
            prompt_bias=prompt.bias,
            prompt_index=options["index"],
            cu_seqlens=rows,
            max_seqlen=batch.max_seqlen,
            backend=backend,
            **others,
        )
        return out.transpose(1, 2) if rows is None else out.unflatten(0, (B, N))

    found = []
    for call in (ours, theirs):
        torch.manual_seed(1)
        out = call()
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for actual, expected in zip(*found, strict=True):
        assert_same_bits(actual, expected)
    with torch.no_grad():
        torch.manual_seed(1)
        assert_equal(ours(), found[0][0])


def test_only_what_trains_gets_a_gradient():
    states, prompt = [x.detach() for x in _states()], _prompt()
    batch = PromptBatch((prompt,), backend="triton")
    layer_attention(*states, prompt, batch, **OPTIONS).sum().backward()
    assert prompt.keys.grad is not None and all(x.grad is None for x in states)


def test_what_is_written_before_backward_is_noticed():
    states, prompt = _states(), _prompt()
    out = layer_attention(*states, prompt, PromptBatch((prompt,), backend="triton"), **OPTIONS)
    with torch.no_grad():
        prompt.keys.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified"):
        out.sum().backward()


def test_gradients_of_gradients_are_refused():
    states, prompt = _states(), _prompt()
    out = layer_attention(*states, prompt, PromptBatch((prompt,), backend="triton"), **OPTIONS)
    (grad,) = torch.autograd.grad(out.square().sum(), prompt.keys, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_layer_that_is_unlike_the_first_is_checked(backend):
    states, prompt = _states(), _prompt()
    batch = PromptBatch((prompt, prompt), backend=backend, asked=Account())
    layer_attention(*states, prompt, batch, **OPTIONS)
    odd = LayerPrompt(prompt.keys[..., :8], prompt.values[..., :8])
    with pytest.raises(ValueError, match=r"prompt_k must be \(2, P, 16\)"):
        layer_attention(*states, odd, batch, **OPTIONS)
    mask = torch.ones(B, N + 1, device=DEVICE, dtype=torch.bool)
    with pytest.raises(ValueError, match="key_mask must be bool or integer of shape"):
        layer_attention(*states, prompt, batch, **{**OPTIONS, "key_mask": mask})
    gated = LayerPrompt(prompt.keys, prompt.values, torch.zeros(H, P + 1, device=DEVICE))
    with pytest.raises(ValueError, match="prompt_bias must be floating point of shape"):
        layer_attention(*states, gated, batch, **OPTIONS)


def test_what_the_first_layer_had_is_checked_once(monkeypatch):
    from ptv2_fast.attention import layer

    seen = []
    check = layer.check_arguments
    monkeypatch.setattr(layer, "check_arguments", lambda *given, **others: (seen.append(1), check(*given, **others)))
    states, prompt = _states(), _prompt()
    batch = PromptBatch((prompt,), backend="triton", asked=Account())
    for _ in range(3):
        layer_attention(*states, prompt, batch, **OPTIONS)
    assert len(seen) == 1
    layer_attention(*states, prompt, PromptBatch((prompt,), backend="triton"), **OPTIONS)
    assert len(seen) == 2


def test_what_layers_see_is_found_once_and_again_when_a_mask_changes(monkeypatch):
    from ptv2_fast.attention import torch_layers

    seen = []
    find = torch_layers.visible
    monkeypatch.setattr(torch_layers, "visible", lambda *given, **others: (seen.append(1), find(*given, **others))[1])
    states, prompt = _states(), _prompt()
    mask = CASES["mask"]["key_mask"].clone()
    batch = PromptBatch((prompt,), backend="torch", asked=Account())
    found = [layer_attention(*states, prompt, batch, **{**OPTIONS, "key_mask": mask}) for _ in range(3)]
    assert len(seen) == 1
    assert_same_bits(found[2], found[0])
    layer_attention(*states, prompt, batch, **{**OPTIONS, "key_mask": mask, "window": 3})
    assert len(seen) == 2
    mask[1, 2:] = True
    changed = layer_attention(*states, prompt, batch, **{**OPTIONS, "key_mask": mask})
    alone = PromptBatch((prompt,), backend="torch")
    assert_same_bits(changed, layer_attention(*states, prompt, alone, **{**OPTIONS, "key_mask": mask}))
    assert not torch.equal(changed[1], found[0][1])


def test_an_empty_prompt_that_trains_gets_zeros_behind_one_that_does_not():
    states = _states()
    empty = [torch.zeros(KV, 0, D, device=DEVICE, requires_grad=trains) for trains in (False, True)]
    batch = PromptBatch((None,), backend="torch", asked=Account())
    for keys in empty:
        out = layer_attention(*states, LayerPrompt(keys, keys), batch, **OPTIONS)
    assert torch.autograd.grad(out.sum(), empty[1])[0].shape == (KV, 0, D)
