"""One call of prompt attention as the kernels see it: four-dimensional views, stride tuples, switches."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.arguments import Factors, Strides, Switches

NO_STRIDES = (0, 0, 0, 0)

# What the kernels of a pass do not read must not make another version of them; tensors: see `Problem.tensors`.
_UNREAD_STRIDES: dict[str, dict[str, Any]] = {
    "backward_text": {"prompt_bias": NO_STRIDES},
    "backward_prompt": {"key_mask": NO_STRIDES, "bias": NO_STRIDES},
}
_UNREAD_SWITCHES: dict[str, dict[str, Any]] = {
    "backward_text": {"HAS_PROMPT": True},
    "backward_prompt": {"IS_CAUSAL": False, "HAS_WINDOW": False},
}


def _as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask that a kernel can load: booleans are reread as bytes, without a copy."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def strides_of(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """A tensor's strides, or four zeros."""
    return NO_STRIDES if tensor is None else tensor.stride()


def heads_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides along (B, H, N, d) of such a tensor, or of a packed (T, H, d) one, where B is 1."""
    if tensor.dim() == 4:
        return tensor.stride()
    of_token, of_head, of_element = tensor.stride()
    return tensor.shape[1] * of_head, of_head, of_token, of_element


@dataclass(frozen=True, eq=False)
class Form:
    """Everything of a call but its addresses, which is worked out once and kept for the calls that follow.

    Attributes:
        arch: what `launch.architecture` says of q's device.
        dtype: of q.
        packed: whether the rows stand one after the other in one token axis.
        tokens: N, or T in packed form.
        long_strides: whether a tensor has to be copied for `launch.tile_safe`.
        num_rows: B, or the number of packed sequences.
        num_queries, num_keys: N and M; the longest row's in packed form.
        num_heads, num_kv_heads, head_dim, prompt_length: H, Hkv, d and P.
        causal, window, softcap, scale, dropout_p: as in `prompt_attention_forward`.
        crowded: which of bias, prompt_bias, and seed or softcap are there; see `launch.choose_config`.
        prompt_strides: of gradients of prompts, `launch.prompt_strides`.
        strides: of the inputs of a kernel.
    """

    arch: int
    dtype: torch.dtype
    packed: bool
    tokens: int
    long_strides: bool
    num_rows: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    prompt_length: int
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    dropout_p: float
    crowded: tuple[bool, bool, bool]
    prompt_strides: tuple[int, ...]
    strides: Strides
    _configs: dict[tuple[str, Any], launch.LaunchConfig] = field(default_factory=dict, init=False)

    @property
    def token_axis(self) -> int:
        """The axis of q, k and v that tokens stand along."""
        return 0 if self.packed else 2

    def config(self, kernel_pass: str) -> launch.LaunchConfig:
        """The launch configuration for a pass."""
        # The tuner puts another function in place of this one.
        key = (kernel_pass, launch.choose_config)
        config = self._configs.get(key)
        if config is None:
            bias, prompt_bias, other = self.crowded
            crowded = (
                other or bias and kernel_pass != "backward_prompt" or prompt_bias and kernel_pass != "backward_text"
            )
            config = launch.choose_config(self.arch, self.head_dim, self.dtype, kernel_pass, crowded)
            self._configs[key] = config
        return config

    def constants(self, kernel_pass: str) -> dict[str, Any]:
        """Strides, numbers and compile-time values that every attention kernel takes, by the names of parameters."""
        return {
            "strides": self.strides._replace(**_UNREAD_STRIDES.get(kernel_pass, {})),
            "num_queries": self.num_queries,
            "num_keys": self.num_keys,
            "prompt_length": self.prompt_length,
            "num_heads": self.num_heads,
            "window": 0 if self.window is None or kernel_pass == "backward_prompt" else self.window,
            "factors": Factors(self.scale, self.softcap or 1.0, self.dropout_p),
            "switches": self._switches()._replace(**_UNREAD_SWITCHES.get(kernel_pass, {})),
            "BLOCK_D": launch.padded_head_dim(self.head_dim),
        }

    def prompt_block(self, block: int) -> int:
        """The number of prompt keys in a tile: `block`, or less when the whole prompt fits less."""
        return min(block, max(16, 1 << (max(1, self.prompt_length) - 1).bit_length()))

    def _switches(self) -> Switches:
        return Switches(
            GROUP=self.num_heads // self.num_kv_heads,
            HEAD_DIM=self.head_dim,
            HAS_PROMPT=self.prompt_length > 0,
            IS_CAUSAL=self.causal,
            HAS_WINDOW=self.window is not None,
            HAS_SOFTCAP=self.softcap is not None,
            HAS_DROPOUT=self.dropout_p > 0.0,
            # Exact products for float32; without meaning for 16-bit operands.
            PRECISION="ieee",
        )

    @functools.cached_property
    def joined(self) -> Form:
        """The same with all packed rows as one."""
        return replace(self, packed=False, num_rows=1, num_queries=self.tokens)


class Problem(NamedTuple):
    """Inputs of one call, normalised; built by `Problem.of`. Shapes as in `kernels/README.md`, section 1.

    q (B, H, N, d), k and v (B, Hkv, M, d) and prompt_k, prompt_v (R, Hkv, P, d) have any strides; in packed form q is
    (T, H, d) and k, v are (T, Hkv, d), `num_rows` is the number of sequences, and `num_queries` bounds the longest.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    prompt_k: torch.Tensor
    prompt_v: torch.Tensor
    key_mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    prompt_index: torch.Tensor | None
    prompt_lens: torch.Tensor | None
    prompt_bias: torch.Tensor | None
    bias: torch.Tensor | None
    seed: torch.Tensor | None
    form: Form

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prompt_k: torch.Tensor,
        prompt_v: torch.Tensor,
        *,
        key_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        prompt_index: torch.Tensor | None = None,
        prompt_lens: torch.Tensor | None = None,
        prompt_bias: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        seed: torch.Tensor | None = None,
    ) -> Problem:
        """Normalise the arguments of `prompt_attention_forward`, whose docstring describes them."""
        key_mask = _as_bytes(key_mask)
        seed = seed if dropout_p > 0.0 else None
        tensors = (
            q,
            k,
            v,
            prompt_k,
            prompt_v,
            key_mask,
            cu_seqlens,
            prompt_index,
            prompt_lens,
            prompt_bias,
            bias,
            seed,
        )
        numbers = (launch.architecture(q.device), max_seqlen, causal, window, softcap, scale, dropout_p)
        key = (numbers, *[None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors])
        form = _forms.get(key)
        if form is None:
            form = launcher.remember(_forms, key, _form(tensors, *numbers), launcher.MOST_REMEMBERED)
        if form.long_strides:
            q, k, v = (launch.tile_safe(x, form.token_axis) for x in (q, k, v))
            prompt_k, prompt_v = launch.tile_safe(prompt_k), launch.tile_safe(prompt_v)
        return cls(
            q, k, v, prompt_k, prompt_v, key_mask, cu_seqlens, prompt_index, prompt_lens, prompt_bias, bias, seed, form
        )

    @property
    def packed(self) -> bool:
        """Whether the rows stand one after the other in one token axis."""
        return self.form.packed

    @property
    def num_rows(self) -> int:
        """B, or the number of packed sequences."""
        return self.form.num_rows

    @property
    def num_queries(self) -> int:
        """N, or the length of the longest packed sequence."""
        return self.form.num_queries

    @property
    def num_keys(self) -> int:
        """M, or the length of the longest packed sequence."""
        return self.form.num_keys

    @property
    def dropout_p(self) -> float:
        """The probability of dropping an attention weight."""
        return self.form.dropout_p

    @property
    def num_heads(self) -> int:
        """H, the number of query heads."""
        return self.form.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Hkv, the number of key/value heads."""
        return self.form.num_kv_heads

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.form.num_heads // self.form.num_kv_heads

    @property
    def head_dim(self) -> int:
        """d, the head size."""
        return self.form.head_dim

    @property
    def prompt_length(self) -> int:
        """P, the length of the longest prompt of the bank."""
        return self.form.prompt_length

    def config(self, kernel_pass: str) -> launch.LaunchConfig:
        """The launch configuration for a pass over this problem."""
        return self.form.config(kernel_pass)

    def prompt_block(self, block: int) -> int:
        """The number of prompt keys in a tile: `block`, or less when the whole prompt fits less."""
        return self.form.prompt_block(block)

    def row_stride(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Strides of a per-(row, head, query) float tensor such as lse: (B, H, N), or (H, T) in packed form."""
        return (0, *tensor.stride()) if self.form.packed else tensor.stride()

    def joined(self) -> Problem:
        """The same with all packed rows as one, for what does not ask where a row ends."""
        return self._replace(cu_seqlens=None, form=self.form.joined)

    def tensors(self, kernel_pass: str) -> tuple[torch.Tensor | None, ...]:
        """The `Inputs` of a pass, as a plain tuple; None also where it does not read a tensor."""
        key_mask, bias, prompt_bias = self.key_mask, self.bias, self.prompt_bias
        prompt_index, prompt_lens = self.prompt_index, self.prompt_lens
        if kernel_pass == "backward_text":
            prompt_index = prompt_lens = prompt_bias = None
        elif kernel_pass == "backward_prompt":
            prompt_index = key_mask = bias = None
        return (
            self.q,
            self.k,
            self.v,
            self.prompt_k,
            self.prompt_v,
            key_mask,
            bias,
            prompt_bias,
            prompt_index,
            prompt_lens,
            self.cu_seqlens,
            self.seed,
        )


_forms: dict[tuple[Any, ...], Form] = {}


def _form(
    tensors: tuple[torch.Tensor | None, ...],
    arch: int,
    max_seqlen: int | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    dropout_p: float,
) -> Form:
    """The form of a call of `Problem.of`, whose arguments are refused here.

    What is equal there has to be the same here: 1, 1.0 and True make one key.
    """
    q, k, v, prompt_k, prompt_v, key_mask, cu_seqlens, prompt_index, _, prompt_bias, bias, seed = tensors
    assert q is not None and k is not None and v is not None and prompt_k is not None and prompt_v is not None
    if q.dtype == torch.bfloat16 and arch == 0:
        raise ValueError(
            "q must be float32 or float16 under Triton's interpreter, whose matrix product misreads bfloat16; "
            f"got {q.dtype}"
        )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not scale > 0.0:
        raise ValueError(f"scale must be positive; got {scale!r}")
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"seed must be given when dropout_p is positive; got dropout_p={dropout_p!r}")
    if prompt_index is None and prompt_k.shape[0] != 1:
        raise ValueError(f"prompt_index must be given for a bank of {prompt_k.shape[0]} prompts; got None")
    packed = cu_seqlens is not None
    if cu_seqlens is not None:
        longest = q.shape[0] if max_seqlen is None else int(max_seqlen)
        num_rows, num_queries, num_keys = cu_seqlens.shape[0] - 1, longest, longest
    else:
        num_rows, num_queries, num_keys = q.shape[0], q.shape[2], k.shape[2]
    if window is not None:
        # One that reaches past both ends hides nothing, and positions plus a window must fit 32 bits.
        window = min(int(window), num_queries + num_keys)
    given = {"q": q, "k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v}
    safe = {
        name: launch.tile_safe(x, 0 if packed and not name.startswith("prompt") else 2) for name, x in given.items()
    }
    return Form(
        arch=arch,
        dtype=q.dtype,
        packed=packed,
        tokens=q.shape[0 if packed else 2],
        long_strides=any(safe[name] is not x for name, x in given.items()),
        num_rows=num_rows,
        num_queries=num_queries,
        num_keys=num_keys,
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[-1],
        prompt_length=prompt_k.shape[2],
        causal=bool(causal),
        window=window,
        softcap=None if softcap is None else float(softcap),
        scale=float(scale),
        dropout_p=float(dropout_p),
        crowded=(bias is not None, prompt_bias is not None, seed is not None or softcap is not None),
        prompt_strides=launch.prompt_strides(safe["prompt_k"]),
        strides=Strides(
            **{name: heads_strides(x) for name, x in safe.items()},
            key_mask=strides_of(key_mask),
            bias=_broadcast_strides(bias),
            prompt_bias=strides_of(prompt_bias),
        ),
    )


def _broadcast_strides(bias: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of a (1 or B, 1 or H, N, M) bias, 0 along the axes it is broadcast over."""
    if bias is None:
        return NO_STRIDES
    return tuple(0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))


# Sizes change from batch to batch; compiling a kernel again for "divisible by 16" or "equal to 1" buys nothing, since
# every access that depends on them is masked. slot_size is not among them: it is a multiple of the head size, and what
# the stores of partial sums are vectorised by.
UNSPECIALIZED = (
    "num_queries", "num_keys", "prompt_length", "num_heads", "num_tiles", "window", "num_entries", "num_splits",
    "num_slots", "num_rows", "bias_slot_size",
)  # fmt: skip
