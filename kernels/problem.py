"""One call of prompt attention as the kernels see it: four-dimensional views, stride tuples, switches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ptv2_fast.kernels import launch

NO_STRIDES = (0, 0, 0, 0)


def _as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask that a kernel can load: booleans are reread as bytes, without a copy."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _as_heads(tensor: torch.Tensor, packed: bool) -> torch.Tensor:
    """(B, H, N, d) of a dense tensor; (1, H, T, d) of a packed (T, H, d) one."""
    return launch.tile_safe(tensor.transpose(0, 1).unsqueeze(0) if packed else tensor)


def strides_of(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """A tensor's strides, or four zeros."""
    return NO_STRIDES if tensor is None else tensor.stride()


@dataclass(frozen=True)
class Problem:
    """Inputs of one call, normalised; built by `Problem.of`. Shapes as in `kernels/README.md`, section 1.

    q (B, H, N, d), k and v (B, Hkv, M, d) and prompt_k, prompt_v (R, Hkv, P, d) are views with any strides; in packed
    form B is 1 in memory, `num_rows` is the number of sequences, and `num_queries` bounds the longest.
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
    num_rows: int
    num_queries: int
    num_keys: int
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    dropout_p: float

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompt_k: torch.Tensor, prompt_v: torch.Tensor, *,
           key_mask: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None, max_seqlen: int | None = None,
           prompt_index: torch.Tensor | None = None, prompt_lens: torch.Tensor | None = None,
           prompt_bias: torch.Tensor | None = None, bias: torch.Tensor | None = None, causal: bool = False,
           window: int | None = None, softcap: float | None = None, scale: float | None = None,
           dropout_p: float = 0.0, seed: torch.Tensor | None = None) -> Problem:
        """Normalise the arguments of `prompt_attention_forward`, whose docstring describes them."""
        if q.dtype == torch.bfloat16 and launch.architecture(q.device) == 0:
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
            longest = q.shape[0] if max_seqlen is None else max_seqlen
            num_rows, num_queries, num_keys = cu_seqlens.shape[0] - 1, longest, longest
        else:
            num_rows, num_queries, num_keys = q.shape[0], q.shape[2], k.shape[2]
        if window is not None:
            # One that reaches past both ends hides nothing, and positions plus a window must fit 32 bits.
            window = min(window, num_queries + num_keys)
        return cls(
            q=_as_heads(q, packed), k=_as_heads(k, packed), v=_as_heads(v, packed),
            prompt_k=launch.tile_safe(prompt_k), prompt_v=launch.tile_safe(prompt_v),
            key_mask=_as_bytes(key_mask), cu_seqlens=cu_seqlens, prompt_index=prompt_index, prompt_lens=prompt_lens,
            prompt_bias=prompt_bias, bias=bias, seed=seed if dropout_p > 0.0 else None, num_rows=num_rows,
            num_queries=num_queries, num_keys=num_keys, causal=causal, window=window, softcap=softcap,
            scale=float(scale), dropout_p=float(dropout_p),
        )

    @property
    def packed(self) -> bool:
        """Whether the rows stand one after the other in one token axis."""
        return self.cu_seqlens is not None

    @property
    def num_heads(self) -> int:
        """H, the number of query heads."""
        return self.q.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Hkv, the number of key/value heads."""
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """d, the head size."""
        return self.q.shape[-1]

    @property
    def prompt_length(self) -> int:
        """P, the length of the longest prompt of the bank."""
        return self.prompt_k.shape[2]

    def config(self, kernel_pass: str) -> launch.LaunchConfig:
        """The launch configuration for a pass over this problem."""
        bias = None if kernel_pass == "backward_prompt" else self.bias
        prompt_bias = None if kernel_pass == "backward_text" else self.prompt_bias
        crowded = any(extra is not None for extra in (self.seed, self.softcap, bias, prompt_bias))
        return launch.choose_config(
            launch.architecture(self.q.device), self.head_dim, self.q.dtype, kernel_pass, crowded)

    def prompt_block(self, block: int) -> int:
        """The number of prompt keys in a tile: `block`, or less when the whole prompt fits less."""
        return min(block, max(16, 1 << (max(1, self.prompt_length) - 1).bit_length()))

    def row_stride(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Strides of a per-(row, head, query) float tensor such as lse: (B, H, N), or (H, T) in packed form."""
        return (0, *tensor.stride()) if self.packed else tensor.stride()

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments that every attention kernel takes: tensors, strides and scalars."""
        return {
            "q_ptr": self.q, "k_ptr": self.k, "v_ptr": self.v,
            "prompt_k_ptr": self.prompt_k, "prompt_v_ptr": self.prompt_v,
            "key_mask_ptr": self.key_mask, "bias_ptr": self.bias, "prompt_bias_ptr": self.prompt_bias,
            "prompt_index_ptr": self.prompt_index, "prompt_lens_ptr": self.prompt_lens,
            "cu_seqlens_ptr": self.cu_seqlens, "seed_ptr": self.seed,
            "q_strides": self.q.stride(), "k_strides": self.k.stride(), "v_strides": self.v.stride(),
            "prompt_k_strides": self.prompt_k.stride(), "prompt_v_strides": self.prompt_v.stride(),
            "key_mask_strides": strides_of(self.key_mask), "bias_strides": _broadcast_strides(self.bias),
            "prompt_bias_strides": strides_of(self.prompt_bias),
            "num_queries": self.num_queries, "num_keys": self.num_keys, "prompt_length": self.prompt_length,
            "num_heads": self.num_heads, "scale": self.scale, "softcap": float(self.softcap or 1.0),
            "window": self.window or 0, "dropout_p": self.dropout_p,
        }

    def switches(self) -> dict[str, Any]:
        """Compile-time keyword arguments that every attention kernel takes."""
        return {
            "GROUP": self.group, "HEAD_DIM": self.head_dim, "BLOCK_D": launch.padded_head_dim(self.head_dim),
            "HAS_PROMPT": self.prompt_length > 0, "IS_CAUSAL": self.causal, "HAS_WINDOW": self.window is not None,
            "HAS_SOFTCAP": self.softcap is not None, "HAS_DROPOUT": self.dropout_p > 0.0,
            # Exact products for float32; without meaning for 16-bit operands.
            "PRECISION": "ieee",
        }


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
