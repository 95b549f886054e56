"""A tiny causal language model with several adapters, and what continuous batching is asked of it."""

from __future__ import annotations

import random
import time

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ptv2_fast.task_models.continuous_batching import SERVED
from tiny_models import VOCABULARY, tiny_model, tiny_prompts

needs_pages = pytest.mark.skipif(not SERVED, reason="this transformers' pages cannot be read beside prompts")
NEW = 6
NAMES = ("default", "prefix", "shallow", "gated", "__base__")


def adapted(family: str = "llama", **base_changes):
    """A model with adapters of every injection and of several lengths, one of them gated."""
    model = tiny_model(family, "deep", "CAUSAL_LM", base_changes=base_changes)
    model.add_adapter("prefix", tiny_prompts("prefix", "CAUSAL_LM", length=3))
    model.add_adapter("shallow", tiny_prompts("shallow", "CAUSAL_LM", length=7))
    model.add_adapter("gated", tiny_prompts("prefix", "CAUSAL_LM", length=2, prompt_init="gated"))
    with torch.no_grad():
        model.adapters["gated"].encoder.gate += 9 + torch.randn_like(model.adapters["gated"].encoder.gate)
    return model.eval()


def settings(**changes) -> GenerationConfig:
    """Greedy, to the last token."""
    return GenerationConfig(**{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, **changes})


def pages(**changes) -> ContinuousBatchingConfig:
    """So few and small pages that requests wait, and so few tokens a step that long texts are read in parts."""
    return ContinuousBatchingConfig(**{"page_size": 4, "num_blocks": 24, "max_batch_tokens": 8, **changes})


def texts(*lengths: int, seed: int = 3) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, VOCABULARY) for _ in range(length)] for length in lengths]


def alone(model, ids: list[int], name: str, new: int = NEW) -> list[int]:
    """What `generate` gives for a request alone."""
    config = settings(max_new_tokens=new, eos_token_id=None)
    return model.generate(torch.tensor([ids]), generation_config=config, adapter_names=[name])[0, len(ids) :].tolist()


def results(manager, count: int, seconds: float = 60.0) -> dict:
    """The final results of a manager, by request."""
    found, end = {}, time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < end and (manager.is_running() or len(found) == count), f"only {sorted(found)} came"
        result = manager.get_result(timeout=0.2)
        if result is not None and result.is_finished():
            found[result.request_id] = result
    return found
