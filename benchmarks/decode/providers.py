"""Who generates behind a prompt: the exact call of each."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache

from benchmarks.attention.flex import merge
from benchmarks.decode.cases import DecodeCase
from benchmarks.step.batches import Prompts
from benchmarks.step.models import twin
from ptv2_fast import PTuningV2Config, get_ptv2_model
from ptv2_fast.inputs.cache import CACHE

_TWO_CALLS = "benchmark_two_calls"
# (input_ids (B, N), how many new tokens) -> tokens (B, count)
Generate = Callable[[Tensor, int], Tensor]
_COMPILED = "torch.compile(one step, mode='reduce-overhead', dynamic=False) in a loop over a StaticCache: "


@dataclass(frozen=True)
class DecodeProvider:
    """One way of generating.

    Attributes:
        name: key in the result file.
        call: the exact call.
        refuses: (device) -> why it cannot run, or None.
        build: (kit) -> generate.
        ours: a wrong result of ours makes the run red.
        compiles: sets a compiled step up.
        extra: no goal compares with it: takes part where every peer is asked for.
        copies: of the keys and values of prompt and text for every row, in the base's dtype; 0 where the prompt is
            read once for all.
    """

    name: str
    call: str
    refuses: Callable[[torch.device], str | None]
    build: Callable[[DecodeKit], Generate]
    ours: bool = False
    compiles: bool = False
    extra: bool = False
    copies: int = 0


@dataclass(frozen=True)
class DecodeKit:
    """What providers are built from.

    Attributes:
        base: the frozen model; each provider works on a twin.
        prompts: the prefix that everybody has.
        case: the cell.
        tiny: a smoke run, in which torch.compile skips its code generator.
    """

    base: nn.Module
    prompts: Prompts
    case: DecodeCase
    tiny: bool = False

    @property
    def length(self) -> int:
        """P."""
        return self.case.P


def decode_providers() -> list[DecodeProvider]:
    """Everyone, ours first."""
    ours = "get_ptv2_model(base, PTuningV2Config('CAUSAL_LM', injection='prefix', position_offset=P))"
    joined = "keys and values of the prefix written in front of every row's own, SDPA"
    return [
        DecodeProvider(
            "ours", f"{ours}.generate(ids, do_sample=False, cache_implementation='dynamic'): every step eager", _always,
            lambda kit: _build_ours(kit, cache_implementation="dynamic"), ours=True,
        ),
        DecodeProvider(
            "ours_captured", f"{ours}.generate(ids, do_sample=False), which captures its steps on CUDA", _always,
            _build_ours, ours=True,
        ),
        DecodeProvider(
            "ours_compiled", _COMPILED + f"{ours}(input_ids=, position_ids=, past_key_values=), cache of text alone",
            _always, _build_ours_compiled, ours=True, compiles=True,
        ),
        DecodeProvider(
            "static_compiled", _COMPILED + joined, _always, _build_static, compiles=True, copies=1,
        ),
        DecodeProvider(
            "peft", "get_peft_model(base, PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=P))"
            ".generate(input_ids=, attention_mask=, do_sample=False), its dynamic cache", _no_peft, _build_peft,
            # Its cache, and the prompt looked up for every row in the prompt's own float32.
            copies=3,
        ),
        DecodeProvider(
            "two_calls", _COMPILED + "flash attention of all rows' queries over the one prefix, attention over a row's "
            "own text, merged by log-sum-exp", _always, _build_two_calls, compiles=True, extra=True,
        ),
        DecodeProvider(
            "ours_static", f"{ours}.generate(ids, do_sample=False, cache_implementation='static'), which transformers "
            "compiles on CUDA", _always, lambda kit: _build_ours(kit, cache_implementation="static"), ours=True,
            compiles=True, extra=True,
        ),
    ]  # fmt: skip


def our_model(kit: DecodeKit) -> nn.Module:
    """Our model with the kit's prefix, in eval mode."""
    config = PTuningV2Config("CAUSAL_LM", num_virtual_tokens=kit.length, injection="prefix", position_offset=kit.length)
    model = get_ptv2_model(twin(kit.base), config)
    with torch.no_grad():
        model.adapters["default"].encoder.prompts.copy_(kit.prompts.prefix)
    return model.eval()


def _build_ours(kit: DecodeKit, **options) -> Generate:
    model = our_model(kit)

    def generate(ids: Tensor, count: int) -> Tensor:
        return model.generate(ids, **_greedy(ids, count), **options)[:, ids.shape[1] :]

    return generate


def _greedy(ids: Tensor, count: int) -> dict[str, object]:
    """Settings of `generate` under which every row gets `count` tokens."""
    return {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False, "pad_token_id": 0,
        "use_cache": True,
    }  # fmt: skip


def _build_peft(kit: DecodeKit) -> Generate:
    from peft import PrefixTuningConfig, get_peft_model

    with warnings.catch_warnings():
        # PEFT asks transformers questions by names that are about to go.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(twin(kit.base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=kit.length))
    model.eval()
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        # A token's values are ordered by layer, key before value, head.
        weight.copy_(kit.prompts.prefix.permute(3, 0, 1, 2, 4).reshape(weight.shape))

    def generate(ids: Tensor, count: int) -> Tensor:
        with torch.no_grad():
            return model.generate(input_ids=ids, **_greedy(ids, count))[:, ids.shape[1] :]

    return generate


class StaticLoop:
    """Greedy generation over a static cache, each step after the first one compiled call.

    Args:
        forward: (input_ids, position_ids, cache) -> logits (B, n, V).
        cache: a StaticCache whose first `written` slots stay.
        first_position: of the text's first token.
        tiny: skip torch.compile's code generator.
    """

    def __init__(self, forward: Callable, cache: StaticCache, written: int, first_position: int, *, tiny: bool):
        self._forward, self._cache = forward, cache
        self._written, self._first = written, first_position
        options = {"backend": "aot_eager"} if tiny else {"mode": "reduce-overhead"}
        self._step = torch.compile(self._next, dynamic=False, **options)

    def _next(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self._forward(tokens, positions, self._cache)[:, -1].argmax(-1, keepdim=True)

    @torch.no_grad()
    def __call__(self, ids: Tensor, count: int) -> Tensor:
        """`count` new tokens for every row of `ids` (B, N)."""
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(self._written)
        positions = torch.arange(ids.shape[1], device=ids.device)[None] + self._first
        token = self._next(ids, positions)
        found = [token]
        positions = positions[:, -1:] + 1
        for _ in range(count - 1):
            torch.compiler.cudagraph_mark_step_begin()
            # What a CUDA graph returns is overwritten by its next run.
            token = self._step(token, positions).clone()
            found.append(token)
            positions = positions + 1
        return torch.cat(found, dim=1)


def _build_static(kit: DecodeKit) -> Generate:
    model = twin(kit.base).eval()
    cache = _cache(kit, kit.length)
    rows = kit.case.B
    with torch.no_grad():
        for index, (keys, values) in enumerate(kit.prompts.prefix.to(kit.base.dtype)):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)

    def forward(tokens, positions, cache):
        return model(
            input_ids=tokens, position_ids=positions, use_cache=True, **{CACHE: cache}, logits_to_keep=1
        ).logits

    return StaticLoop(forward, cache, kit.length, kit.length, tiny=kit.tiny)


def _build_ours_compiled(kit: DecodeKit) -> Generate:
    model = our_model(kit)

    def forward(tokens, positions, cache):
        # Ours adds the offset of the text to the positions itself.
        return model(
            input_ids=tokens, position_ids=positions, use_cache=True, **{CACHE: cache}, logits_to_keep=1
        ).logits

    return StaticLoop(forward, _cache(kit, 0), 0, 0, tiny=kit.tiny)


def _build_two_calls(kit: DecodeKit) -> Generate:
    AttentionInterface.register(_TWO_CALLS, two_call_attention)
    AttentionMaskInterface.register(_TWO_CALLS, lambda *_, **__: None)
    model = twin(kit.base, _TWO_CALLS).eval()
    prefix = kit.prompts.prefix.to(kit.base.dtype)

    def forward(tokens, positions, cache):
        return model(
            input_ids=tokens, position_ids=positions, use_cache=True, **{CACHE: cache}, logits_to_keep=1,
            benchmark_prefix=prefix, benchmark_slots=positions - kit.length,
        ).logits  # fmt: skip

    return StaticLoop(forward, _cache(kit, 0), 0, kit.length, tiny=kit.tiny)


def _cache(kit: DecodeKit, written: int) -> StaticCache:
    """Room for the prompt (where it is written in), the text and the longest generation."""
    return StaticCache(config=kit.base.config, max_cache_len=written + kit.case.N + kit.case.new + 1)


def two_call_attention(
    module, query, key, value, attention_mask, scaling=None, benchmark_prefix=None, benchmark_slots=None, **_
):
    """Attention over a shared prefix, read once for all rows, and over each row's own slots, merged.

    Args:
        query: (B, H, n, d); key, value: (B, Hkv, M, d), the whole static cache of the text.
        benchmark_prefix: (L, 2, Hkv, P, d).
        benchmark_slots: (1, n), the slot of each query; later slots are not written yet.
    """
    rows, heads, count, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(rows, kv_heads, heads // kv_heads, count, size)
    # (1, Hkv, B * group * n, d): every row's queries against the one prefix.
    together = grouped.permute(1, 0, 2, 3, 4).reshape(1, kv_heads, -1, size)
    out, lse = _flash(together, *(x[None] for x in benchmark_prefix[module.layer_idx]), scaling)
    first = out.view(kv_heads, rows, -1, count, size).transpose(0, 1)
    first_lse = lse.view(kv_heads, rows, -1, count).transpose(0, 1)

    scores = torch.einsum("bkgnd,bkmd->bkgnm", grouped, key).float() * scaling
    visible = torch.arange(key.shape[2], device=key.device) <= benchmark_slots[0, :, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    second_lse = scores.logsumexp(-1)
    second = torch.einsum("bkgnm,bkmd->bkgnd", (scores - second_lse[..., None]).exp().to(value.dtype), value)
    merged = merge(first, first_lse, second, second_lse).reshape(rows, heads, count, size)
    return merged.transpose(1, 2), None


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Flash attention with its log-sum-exp; written out where there is no such kernel."""
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


def _always(device: torch.device) -> str | None:
    return None


def _no_peft(device: torch.device) -> str | None:
    return None if importlib.util.find_spec("peft") is not None else "peft is not installed"
