"""Which savings of a training step are on, decided in one place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch

from ptv2_fast.step.capture import CAPTURES
from ptv2_fast.step.float8_plan import Float8Found, decide_float8

# Evaluation reads logits and states, and few would wait for a compiler there.
_TRAINING_ALONE = ("labelled_rows_loss", "last_rows", "compile_layers")

_NOT_TRACED = ("unpad", "labelled_rows_loss", "fused_projections", "compile_layers")

# What reads, moves or traces weights outside the forward of the module that has them.
_NEEDS_WEIGHTS = ("labelled_rows_loss", "fused_projections", "compile_layers", "cuda_graphs")

# Multiply-adds of a layer's maps that dropped padding has to save on a CPU, where nobody asked for it: what packed
# attention costs besides takes as long (BERT of widths 32 to 384, forward and backward).
_WORTH_UNPADDING = 16_000_000

logger = logging.getLogger("ptv2_fast")


@dataclass(frozen=True)
class StepOptions:
    """Switches of the training step; each None means: on where it is exact and meant to pay.

    That they pay was measured, on a CPU and on an H200 (benchmarks/README.md).

    Attributes:
        unpad: run the layers over real tokens only; padding is dropped before the first layer and put back, as
            zeros, after the last. None: while training, with the triton backend, or on the CPU, where a batch with so
            little padding that it saves no time runs as it is and has zeros there all the same.
        labelled_rows_loss: causal language models compute logits for labelled tokens only, in chunks, and return
            a loss without logits. None: while training on CUDA.
        fused_projections: queries, keys and values (and gate and up) of the frozen base by one matrix product; their
            weights become views of one buffer. None: while training on CUDA.
        last_rows: the last layer computes only the rows that are read: a pooled token, or the tokens whose successor
            has a label. None: while training.
        compile_layers: while training, torch.compile the body of each layer, all layers sharing what is compiled (the
            last one, where it computes read rows alone, is left as it is). None: off, since the first step then takes
            as long as the compilation.
        cuda_graphs: the model's own forward captures forward and backward and replays them, in whatever loop it is
            called; a `GraphRunner` the optimizer's update as well. None: while training on CUDA. `generate` captures
            its decode steps on CUDA, unless this is False or a call chooses its cache.
        float8: while training, the frozen linear maps of the layers multiply in float8, forward and backward, from
            quantized copies of their weights (docs/float8.md); refused where no map can. It is no saving that
            leaves results as they are, so None is: off, but for maps that are float8 already and have no backward of
            their own.

    Raises:
        ValueError: a switch is something else than True, False or None.

    Example:
        ```python
        from transformers import BertConfig, BertModel

        from ptv2_fast import PTuningV2Config, StepOptions, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        config = PTuningV2Config("SEQ_CLS", heads={"topic": 3})
        model = get_ptv2_model(base, config, step_options=StepOptions(unpad=False))
        print(model.train().step_plan())  # each switch, and why it is on or off
        model.step_options = StepOptions()
        ```
    """

    unpad: bool | None = None
    labelled_rows_loss: bool | None = None
    fused_projections: bool | None = None
    last_rows: bool | None = None
    compile_layers: bool | None = None
    cuda_graphs: bool | None = None
    float8: bool | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # 1 equals True and is another switch to whoever asks for True itself.
            if not (value is None or isinstance(value, bool)):
                raise ValueError(f"{field.name} must be True, False or None; got {value!r}")


@dataclass(frozen=True)
class StepPlan:
    """What a step does, and for each switch why; fields named as in `StepOptions` say whether a switch is on.

    Attributes:
        reasons: for each switch whether it is on, and why.
        weights_owner: who brings the weights only while their modules run (`backbone.sharded_weights` says); None where
            they stay.
        worth_unpadding: multiply-adds of a layer that dropped padding has to save.
        float8_copies: float8 multiplies copies of weights that are not float8 themselves, too.

    Example:
        ```python
        from transformers import BertConfig, BertModel

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", heads={"topic": 3}))
        plan = model.train().step_plan()
        assert plan.last_rows and "last_rows on (training)" in plan.reasons
        ```
    """

    unpad: bool
    labelled_rows_loss: bool
    fused_projections: bool
    last_rows: bool
    compile_layers: bool
    cuda_graphs: bool
    float8: bool
    reasons: tuple[str, ...]
    weights_owner: str | None = None
    worth_unpadding: int = 0
    float8_copies: bool = False

    def unpads(self, mask: torch.Tensor, width: int) -> bool:
        """Whether padding is dropped from a batch with this mask (B, N), of a model whose states have this width."""
        if not self.unpad or not self.worth_unpadding:
            return self.unpad
        # The maps of a layer have about 12 width^2 weights.
        return (mask.numel() - int(mask.count_nonzero())) * 12 * width**2 >= self.worth_unpadding

    def __str__(self) -> str:
        return "; ".join(self.reasons)


def plan_step(
    options: StepOptions,
    *,
    training: bool,
    device: torch.device,
    backend: str,
    weights_owner: str | None = None,
    without: Mapping[str, str] | None = None,
    find_float8: Callable[[], Float8Found] | None = None,
) -> StepPlan:
    """Decide every switch for a step on `device` through `backend` ("auto" is triton on CUDA).

    Args:
        weights_owner: who brings the weights only while their modules run, as `backbone.sharded_weights` says.
        without: switch -> why it has nothing to save on this model.
        find_float8: tells what float8 can do on this model, where it may be wanted.

    Raises:
        ValueError: float8 is asked for, or needed, where it cannot be; or needed and off.
    """
    on_cuda = device.type == "cuda"
    triton = on_cuda and backend in ("auto", "triton")
    # Inside torch.compile the whole model is one graph: sizes that depend on data would break it, and views that hold
    # state between calls stay out of it.
    traced = torch.compiler.is_compiling()
    rules = {
        "unpad": (training and (triton or device.type == "cpu"), "training on the CPU or with triton"),
        "labelled_rows_loss": (training and on_cuda, "training on CUDA"),
        "fused_projections": (training and on_cuda, "training on CUDA"),
        "last_rows": (training, "training"),
        "compile_layers": (False, "unless asked for"),
        "cuda_graphs": (training and device.type in CAPTURES, "training on CUDA"),
    }
    decided, reasons = {}, []
    for name, (pays, where) in rules.items():
        asked = getattr(options, name)
        decided[name] = pays if asked is None else asked
        why = "asked for" if asked is not None else where if pays or where.startswith("unless") else f"not {where}"
        if traced and name in _NOT_TRACED and decided[name]:
            decided[name], why = False, "inside torch.compile"
        if weights_owner is not None and name in _NEEDS_WEIGHTS and decided[name]:
            decided[name], why = False, f"weights come and go: {weights_owner}"
        if not training and name in _TRAINING_ALONE and decided[name]:
            decided[name], why = False, "not training"
        if without and name in without:
            decided[name], why = False, without[name]
        reasons.append(f"{name} {'on' if decided[name] else 'off'} ({why})")
    found = find_float8() if find_float8 is not None and training and not traced else None
    cannot = (without or {}).get("float8")
    cannot = f"weights that come and go: {weights_owner}" if weights_owner is not None else cannot
    decided["float8"], why = decide_float8(options.float8, found, training=training, traced=traced, cannot=cannot)
    reasons.append(f"float8 {'on' if decided['float8'] else 'off'} ({why})")
    worth = 0 if options.unpad is not None or on_cuda else _WORTH_UNPADDING
    return StepPlan(
        **decided,
        reasons=tuple(reasons),
        weights_owner=weights_owner,
        worth_unpadding=worth,
        float8_copies=decided["float8"] and options.float8 is True,
    )
