"""The sizes of a model from its config.json alone, where its kind says them in a known way; torch is not needed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# Sizes, heads and layers as most configurations call them, and those that call them otherwise.
_USUAL = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_OTHER = {
    "distilbert": ("dim", "n_layers", "n_heads"),
    "gpt2": ("n_embd", "n_layer", "n_head"),
    "gptj": ("n_embd", "n_layer", "n_head"),
}
_ENCODERS = (
    "bert", "roberta", "xlm-roberta", "electra", "albert", "deberta-v2", "distilbert", "modernbert", "mpnet",
)  # fmt: skip
# Decoders whose heads are of hidden_size / heads, as many keys as queries; and those whose configuration says both.
_DECODERS = ("gpt2", "gptj", "gpt_neox", "opt")
_GROUPED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "olmo2",
    "glm",
    "glm4",
    "cohere",
    "cohere2",
    "phi3",
    "gemma2",
    "smollm3",
)
PLAIN = (*_ENCODERS, *_DECODERS, *_GROUPED)
# Where head_dim is not said it is one of the model's own, not hidden_size / heads.
_OWN_HEAD_SIZE = ("qwen3", "glm", "glm4", "gemma2")


def sizes_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `info` says of a model, but for parameters; None where the configuration does not say it plainly."""
    kind = config.get("model_type")
    if kind not in PLAIN or config.get("is_decoder") or "quantization_config" in config:
        return None
    names = _OTHER.get(kind, _USUAL)
    hidden, layers, heads = (config.get(name) for name in names)
    groups = config.get("num_key_value_heads") if kind in _GROUPED else heads
    size = config.get("head_dim")
    if size is None and kind not in _OWN_HEAD_SIZE and isinstance(hidden, int) and isinstance(heads, int) and heads:
        size = hidden // heads
    numbers = (hidden, layers, heads, groups, size)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    return {
        "model_type": kind,
        "reads": "input_ids",
        "causal": kind not in _ENCODERS,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": groups,
        "head_dim": size,
        "embedding_size": config.get("embedding_size") or config.get("word_embed_proj_dim") or hidden,
    }


def stored_parameters(folder: Path) -> int | None:
    """How many numbers a folder's safetensors files hold; None where it has none that are whole."""
    files = sorted(folder.glob("model*.safetensors"))
    total = 0
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
        except (SafetensorError, OSError):
            return None
    return total if files else None


def plain_facts(folder: Path) -> dict[str, Any] | None:
    """`sizes_in` of a model's folder."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else None
    return sizes_in(config) if isinstance(config, dict) else None
