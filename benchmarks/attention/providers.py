"""Who is compared: every provider, the exact call it stands for, and why it cannot serve a case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.attention.cases import Case
from benchmarks.attention.flex import flex_providers
from benchmarks.attention.inputs import BANK_TASKS, Inputs
from benchmarks.attention.provider import Call, Provider, join_prompt
from benchmarks.attention.row_choice import one_kernel_for_each_gradient
from ptv2_fast.attention import prompt_attention
from ptv2_fast.attention.triton_backend import unavailable_reason


def all_providers() -> list[Provider]:
    """Every provider, ours first."""
    return [*_our_providers(), *_sdpa_providers(), *flex_providers()]


# Ours


def _our_providers() -> list[Provider]:
    call = "prompt_attention(q, k, v, prompt_k, prompt_v, key_mask=, causal=, backend='triton')"
    return [
        Provider("ours", call, _no_triton, _build_ours("triton"), ours=True, triton=True, peers=("all", "flex")),
        Provider(
            "ours_packed",
            "the same on real tokens only: q (T, H, d), cu_seqlens=, max_seqlen= (packed outside the"
            " timing: a training step packs once, before its first layer)",
            lambda case, device: _no_triton(case, device) or _no_padding(case),
            _build_packed,
            ours=True,
            triton=True,
        ),
        Provider(
            "ours_prefix",
            call + ", only prompt_k and prompt_v requiring gradients (the first prompted layer)",
            lambda case, device: _no_triton(case, device) or _no_backward(case) or _no_prompt(case),
            _build_ours("triton", prompt_only=True),
            ours=True,
            triton=True,
            prompt_only=True,
        ),
        Provider(
            "ours_by_gradient",
            call + ", one kernel for each gradient where one for whole rows may be chosen",
            lambda case, device: _no_triton(case, device) or _no_backward(case) or _long_rows(case),
            _build_ours("triton"),
            ours=True,
            triton=True,
            around=one_kernel_for_each_gradient,
        ),
        Provider(
            "ours_bank16",
            f"the same, row b using prompt b % {BANK_TASKS} of a bank through prompt_index=",
            lambda case, device: _no_triton(case, device) or _few_rows(case) or _no_prompt(case),
            _build_ours("triton", bank=True),
            ours=True,
            triton=True,
            bank=True,
        ),
        Provider(
            "ours_torch",
            call.replace("triton", "torch"),
            lambda case, device: None,
            _build_ours("torch"),
            ours=True,
        ),
    ]


def _build_ours(backend: str, *, bank: bool = False, prompt_only: bool = False):
    def build(case: Case, inputs: Inputs) -> Call:
        text = [inputs.q, inputs.k, inputs.v]
        prompts = [inputs.bank_k, inputs.bank_v] if bank else [inputs.prompt_k, inputs.prompt_v]
        text = [x.detach().requires_grad_(case.gradients and not prompt_only) for x in text]
        prompts = [x.detach().requires_grad_(case.gradients) for x in prompts]
        options = {
            "key_mask": inputs.key_mask,
            "prompt_index": inputs.prompt_index if bank else None,
            "causal": case.causal,
            "backend": backend,
        }
        names = ("prompt_k", "prompt_v") if prompt_only else ("q", "k", "v", "prompt_k", "prompt_v")
        return Call(
            forward=lambda: prompt_attention(*text, *prompts, **options),
            leaves=tuple(prompts if prompt_only else text + prompts),
            grad_out=inputs.grad_out,
            common=lambda out, grads: {"out": out, **dict(zip(names, grads, strict=False))},
        )

    return build


def _build_packed(case: Case, inputs: Inputs) -> Call:
    real = inputs.real

    def pack(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[real]  # (T, heads, d)

    def unpack(x: Tensor) -> Tensor:
        dense = x.new_zeros(case.B, case.N, x.shape[1], case.d)
        dense[real] = x
        return dense.transpose(1, 2)

    text = [pack(x) for x in (inputs.q, inputs.k, inputs.v)]
    prompts = [inputs.prompt_k, inputs.prompt_v]
    leaves = tuple(x.detach().requires_grad_(case.gradients) for x in text + prompts)
    cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    longest = max(case.lengths)

    def common(out: Tensor, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
        results = {"out": unpack(out)}
        for name, grad in zip(("q", "k", "v"), grads, strict=False):
            results[name] = unpack(grad)
        return results | dict(zip(("prompt_k", "prompt_v"), grads[3:], strict=False))

    return Call(
        forward=lambda: prompt_attention(
            *leaves,
            cu_seqlens=cu_seqlens,
            max_seqlen=longest,
            causal=case.causal,
            backend="triton",
        ),
        leaves=leaves,
        grad_out=pack(inputs.grad_out),
        common=common,
    )


# PyTorch's scaled_dot_product_attention


@dataclass(frozen=True)
class Sdpa:
    """One way of calling scaled_dot_product_attention on [prompt ; text].

    Attributes:
        backend: forced with `sdpa_kernel`; None leaves the choice to PyTorch.
        concat: the prompt is expanded and concatenated inside the timing, else it was before.
        mask: "prebuilt" before the timing, "inside" it, or "none" (causal: `causal_lower_right`).
    """

    backend: SDPBackend | None
    concat: bool
    mask: str

    def build(self, case: Case, inputs: Inputs) -> Call:
        """Bind to the tensors of a case; see `Provider.build`."""
        wants_mask = self.mask != "none" and (case.causal or inputs.key_mask is not None)
        # transformers repeats key/value heads whenever a mask is present.
        repeat = case.group if wants_mask or self.backend == SDPBackend.EFFICIENT_ATTENTION else 1
        mask = joint_mask(case, inputs) if wants_mask and self.mask == "prebuilt" else None
        if self.mask == "none" and case.causal:
            mask = causal_lower_right(case.N, case.P + case.N)
        gqa = repeat != case.group
        row_k, row_v = (
            join_prompt(p, x, 1 if self.concat else repeat)
            for p, x in ((inputs.prompt_k, inputs.k), (inputs.prompt_v, inputs.v))
        )
        if self.concat:
            parts = (inputs.q, inputs.k, inputs.v, inputs.prompt_k, inputs.prompt_v)
        else:
            parts = (inputs.q, row_k, row_v)
        leaves = tuple(x.detach().requires_grad_(case.gradients) for x in parts)

        def forward() -> Tensor:
            q, k, v = leaves[:3]
            if self.concat:
                k, v = join_prompt(leaves[3], k, repeat), join_prompt(leaves[4], v, repeat)
            bias = joint_mask(case, inputs) if wants_mask and mask is None else mask
            if self.backend is None:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)
            with sdpa_kernel(self.backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)

        return Call(forward, leaves, inputs.grad_out, self._common(case, repeat))

    def _common(self, case: Case, repeat: int):
        def common(out: Tensor, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
            results = {"out": out}
            if self.concat:
                return results | dict(zip(("q", "k", "v", "prompt_k", "prompt_v"), grads, strict=False))
            if grads:
                results["q"] = grads[0]
            for name, grad in zip(("k", "v"), grads[1:], strict=False):
                # Sums that a caller would still have to take; outside this variant's timing.
                kv = grad.unflatten(1, (case.Hkv, repeat)).float().sum(2).to(grad.dtype)
                results[name] = kv[:, :, case.P :]
                results[f"prompt_{name}"] = kv[:, :, : case.P].float().sum(0).to(grad.dtype)
            return results

        return common

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Why this variant cannot serve a case, or None."""
        if self.backend is not None and device.type != "cuda":
            return f"{self.backend.name} is forced: needs a CUDA device"
        sixteen = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        if self.backend in sixteen and case.dtype not in ("bf16", "fp16"):
            return f"takes 16-bit tensors only; got {case.dtype}"
        masked = case.causal or case.padding > 0.0
        if self.mask == "none":
            # With causality, right padding stands after every key that a real query may see.
            if case.padding and not case.causal:
                return "takes no mask, and the batch has padding"
            if case.causal and case.P and self.backend == SDPBackend.CUDNN_ATTENTION:
                return "is_causal with fewer queries than keys is aligned to the upper left"
        elif self.mask == "inside" and not masked:
            return "there is no mask to build: no padding, not causal"
        elif self.backend is not None and not masked:
            return "there is no mask: no padding, not causal"
        return None


def joint_mask(case: Case, inputs: Inputs) -> Tensor:
    """True where a query sees a key of [prompt ; text]: (B, 1, 1, P + N), causal (B or 1, 1, N, P + N)."""
    real = inputs.real
    seen = torch.cat([real.new_ones(case.B, case.P), real], dim=1)[:, None, None, :]
    if not case.causal:
        return seen
    ones = real.new_ones(case.N, case.P + case.N)
    lower = torch.tril(ones, diagonal=case.P)[None, None]
    return lower if inputs.key_mask is None else seen & lower


def _sdpa_providers() -> list[Provider]:
    keys = "cat([prompt.expand(B, -1, -1, -1), text], 2)"
    placed = {True: f"{keys} inside the timing", False: f"{keys} before the timing"}
    masks = {
        "prebuilt": "bool mask over prompt and text built before",
        "inside": "bool mask over prompt and text built inside",
        "none": "no mask (causal: causal_lower_right)",
    }
    kinds = [
        ("sdpa_user", None, True, "prebuilt"),
        ("sdpa_inside", None, True, "inside"),
        ("sdpa_outside", None, False, "prebuilt"),
        ("cudnn", SDPBackend.CUDNN_ATTENTION, False, "none"),
        ("cudnn_concat", SDPBackend.CUDNN_ATTENTION, True, "none"),
        ("cudnn_mask", SDPBackend.CUDNN_ATTENTION, False, "prebuilt"),
        ("cudnn_mask_concat", SDPBackend.CUDNN_ATTENTION, True, "prebuilt"),
        ("flash", SDPBackend.FLASH_ATTENTION, False, "none"),
        ("flash_concat", SDPBackend.FLASH_ATTENTION, True, "none"),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION, False, "none"),
        ("efficient_mask", SDPBackend.EFFICIENT_ATTENTION, False, "prebuilt"),
        ("efficient_mask_concat", SDPBackend.EFFICIENT_ATTENTION, True, "prebuilt"),
    ]
    providers = []
    for name, backend, concat, mask in kinds:
        variant = Sdpa(backend, concat, mask)
        forced = "" if backend is None else f"sdpa_kernel({backend.name}): "
        call = f"{forced}F.scaled_dot_product_attention; keys {placed[concat]}; {masks[mask]}"
        peers = ("all", "flex") if name == "sdpa_user" else ("all",)
        providers.append(Provider(name, call, variant.refuses, variant.build, peers=peers))
    return providers


# Reasons


def _no_triton(case: Case, device: torch.device) -> str | None:
    return unavailable_reason(device)


def _no_padding(case: Case) -> str | None:
    return None if case.padding else "there is no padding to leave out"


def _no_backward(case: Case) -> str | None:
    return None if case.gradients else "it differs from ours in backward only"


def _long_rows(case: Case) -> str | None:
    return None if case.N <= 128 else f"no kernel owns rows of more than 128 tokens: {case.N}"


def _no_prompt(case: Case) -> str | None:
    return None if case.P else "there is no prompt"


def _few_rows(case: Case) -> str | None:
    return None if case.B >= BANK_TASKS else f"fewer rows than its {BANK_TASKS} tasks: {case.B}"
