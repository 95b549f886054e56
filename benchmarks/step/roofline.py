"""The useful work of a training step, from the configuration: operations and bytes for real tokens only."""

from __future__ import annotations

from torch import nn

from benchmarks.attention import roofline
from benchmarks.attention.cases import Case
from benchmarks.attention.roofline import Work
from benchmarks.step.cases import StepCase
from benchmarks.step.models import sizes_of

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def layer_weights(base: nn.Module) -> float:
    """Weights of one layer's matrices: queries, keys, values, output, and two or three of the feed-forward part."""
    sizes, config = sizes_of(base), base.config
    attention = sizes.hidden_size * sizes.head_dim * (2 * sizes.num_heads + 2 * sizes.num_kv_heads)
    matrices = 3 if base.get_output_embeddings() is not None else 2
    return attention + matrices * sizes.hidden_size * config.intermediate_size


def step_work(case: StepCase, base: nn.Module, *, prompt: bool = True) -> Work:
    """Operations and bytes of forward and backward.

    operations = 2 products (forward, input gradient) of every frozen matrix with T real tokens,
                 + attention over P + own text, forward and backward,
                 + keys and values of the prompt, forward and input gradient,
                 + the logits of a causal model, forward and input gradient.
    bytes      = every frozen matrix read twice, each layer's input written once and read once.

    No gradient of a frozen weight counts, no padding, no prompt row beyond its keys and values. Nothing is taken off
    for the first layer, below which no gradient is asked for, or for the last, of which a classifier reads one row.

    Args:
        prompt: False for the model without one.
    """
    sizes = sizes_of(base)
    tokens, size = sum(case.lengths), _BYTES[case.dtype]
    length = case.P if prompt else 0
    weights = layer_weights(base) * sizes.num_layers
    operations = 4.0 * weights * tokens
    prompt_weights = 2 * sizes.hidden_size * sizes.num_kv_heads * sizes.head_dim * sizes.num_layers
    operations += 4.0 * prompt_weights * length
    if case.causal:
        head = base.config.vocab_size * sizes.hidden_size
        operations += 4.0 * head * tokens
        weights += head
    attention = Case(
        case.model, case.B, case.N, length, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim,
        causal=case.causal, padding=case.padding, dtype=case.dtype,
    )  # fmt: skip
    operations += roofline.work(attention).flops * sizes.num_layers
    states = 2 * tokens * sizes.hidden_size * sizes.num_layers
    return Work(operations, size * (2 * weights + states))
