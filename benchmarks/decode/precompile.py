"""Our kernels of generation, compiled ahead of the clock by `attention.precompile.Compilers`."""

from __future__ import annotations

import torch

from benchmarks.decode.cases import DecodeCase
from benchmarks.decode.providers import DecodeKit, decode_providers
from benchmarks.step.batches import make_prompts
from benchmarks.step.cases import StepCase
from benchmarks.step.models import FIRST_WORD, build_base
from benchmarks.step.precompile import LAYERS, compile_step


def compile_decode(case: DecodeCase, tiny: bool = False) -> None:
    """Generate a few tokens behind a prompt with a few layers of a model. For a worker."""
    device = torch.device("cpu" if tiny else "cuda")
    base = build_base(case.model, device, case.torch_dtype, layers=LAYERS).eval()
    base.generation_config.eos_token_id = None
    kit = DecodeKit(base, make_prompts(base, case.P), case, tiny=tiny)
    ours = next(p for p in decode_providers() if p.name == "ours")
    ours.build(kit)(torch.full((case.B, case.N), FIRST_WORD, device=device), 3)


def compile_cell(case: StepCase | DecodeCase, tiny: bool = False) -> None:
    """Compile what a step or a generation of ours launches. For a worker."""
    (compile_decode if isinstance(case, DecodeCase) else compile_step)(case, tiny)
