"""What the attention kernels take, gathered: Triton lets a NamedTuple be one argument, and a field may be None.

A kernel takes `inputs` and `own`, the tensors of its pass: what it reads besides the inputs, and what it writes.
Their strides are two arguments more, of the same fields.

Sizes stay arguments of their own, because Triton compiles a kernel anew for a field that is 1 or a multiple of 16,
whatever `do_not_specialize` says. So do the sizes of tiles: Triton 3.6 makes no shape from a field of a compile-time
tuple. Nor does it bear None beside tuples in a tuple: strides that nobody reads are zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Inputs(NamedTuple):
    """Tensors of a call of attention, in a kernel pointers; None where a call has none or a pass does not read it."""

    q: Any
    k: Any
    v: Any
    prompt_k: Any
    prompt_v: Any
    key_mask: Any
    bias: Any
    prompt_bias: Any
    prompt_index: Any
    prompt_lens: Any
    cu_seqlens: Any
    seed: Any


class Strides(NamedTuple):
    """Strides of those of them that are more than a list; of a packed tensor as if it were one row."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    prompt_k: tuple[int, ...]
    prompt_v: tuple[int, ...]
    key_mask: tuple[int, ...]
    bias: tuple[int, ...]
    prompt_bias: tuple[int, ...]


class Factors(NamedTuple):
    """The real numbers of a call; softcap is 1 where there is none."""

    scale: float
    softcap: float
    dropout_p: float


class Switches(NamedTuple):
    """What is decided of a call when its kernel is compiled; one argument, `tl.constexpr`."""

    GROUP: int
    HEAD_DIM: int
    HAS_PROMPT: bool
    IS_CAUSAL: bool
    HAS_WINDOW: bool
    HAS_SOFTCAP: bool
    HAS_DROPOUT: bool
    PRECISION: str


class Results(NamedTuple):
    """What the forward writes, or a step of decoding for each part of its keys; also their strides."""

    o: Any
    lse: Any


class KeyList(NamedTuple):
    """One of a row's two lists of keys, the prompt's or the text's; made in a kernel: pointers of its key 0."""

    k: Any
    v: Any
    k_strides: Any
    v_strides: Any


class Pairs(NamedTuple):
    """What is known of the pairs of a tile's queries and the keys of one list, besides q and k; made in a kernel.

    bias: pointers of key 0's, 2-D along the queries, or None. mask: pointer of key 0's entry, or None. shift: query i
    stands at position i + shift. first_column: key 0's column of the dropout.
    """

    bias: Any
    bias_stride: Any
    mask: Any
    mask_stride: Any
    shift: Any
    window: Any
    first_column: Any


class QueryTile(NamedTuple):
    """A tile of queries of one row and head in the forward; made in a kernel.

    queries: their indices, 2-D. num_queries: the row's. seed, stream: the dropout's; see `tiles.dropout_keep`.
    """

    q: Any
    queries: Any
    num_queries: Any
    seed: Any
    stream: Any


class GradientTile(NamedTuple):
    """The same in the backward, with what the passes read of each query."""

    q: Any
    do: Any
    lse: Any
    delta: Any
    queries: Any
    num_queries: Any
    seed: Any
    stream: Any


class Blocks(NamedTuple):
    """Where a tile's blocks of another axis lie: partial ones, full ones from head_end to body_end, partial ones."""

    begin: Any
    head_end: Any
    body_end: Any
    end: Any
