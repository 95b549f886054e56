"""Who takes part in a step: the exact call of each, and why one cannot serve a cell."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from benchmarks.step.batches import Batch, Prompts
from benchmarks.step.cases import TASKS, StepCase
from benchmarks.step.forms import Bound, deep_form, head_of, plain_form, prefix_form, task_loss
from benchmarks.step.models import twin
from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.adapter import BASE_ROW
from ptv2_fast.step import layers
from ptv2_fast.step.capture import CAPTURES
from ptv2_fast.step.options import StepOptions

EVERY = ("eager", "compiled")
_INPUTS = "(input_ids=, attention_mask=, labels=)"
_OURS = f"get_ptv2_model(base, PTuningV2Config(task_type=, num_virtual_tokens=P)){_INPUTS}, injection='deep'"
_PEFT = f"get_peft_model(base, PrefixTuningConfig(task_type=, num_virtual_tokens=P)){_INPUTS}"
_RUNNER = "GraphRunner(the same model, AdamW(prompts)).step(batch on the CPU): the whole step, captured on CUDA"
_COMPILED = "torch.compile(forward and loss, mode='reduce-overhead', dynamic=False), cudagraph_mark_step_begin(): "


@dataclass(frozen=True)
class StepProvider:
    """One way of taking a step.

    Attributes:
        name: key in the result file.
        call: the exact call, as a user would write it.
        form: which of `forms.FORMS` it computes, hence who judges it.
        refuses: (case, device) -> why it cannot serve the case, or None.
        build: (kit) -> the provider bound to a model.
        ours: a wrong result of ours makes the run red.
        compiles: takes long to set up, whole model and shape at once.
        peers: the peer sets of cells it takes part in.
        extra: no goal compares with it: takes part where every peer is asked for.
    """

    name: str
    call: str
    form: str
    refuses: Callable[[StepCase, torch.device], str | None]
    build: Callable[[Kit], Bound]
    ours: bool = False
    compiles: bool = False
    peers: tuple[str, ...] = EVERY
    extra: bool = False


class Kit:
    """What the providers of a group of cells are built from; models that several share are built once.

    Attributes:
        base: the frozen model, which no provider changes: each works on a twin.
        prompts: where every trained prompt starts.
        case: the first cell of the group.
        tiny: a smoke run, in which torch.compile skips its code generator.
        backend: of our prompt attention.
    """

    def __init__(self, base: nn.Module, prompts: Prompts, case: StepCase, *, tiny: bool = False, backend: str = "auto"):
        self.base, self.prompts, self.case, self.tiny, self.backend = base, prompts, case, tiny, backend
        self._ours: nn.Module | None = None
        if tiny:
            # A smoke run is over before a code generator has begun.
            layers.COMPILER = "aot_eager"

    @property
    def device(self) -> torch.device:
        """Where the cells run."""
        return self.base.device

    def ours(self) -> nn.Module:
        """Our model over a twin of the base, its prompts those of the kit, its head frozen."""
        if self._ours is None:
            model = get_ptv2_model(twin(self.base), self._config())
            self._start(model, "default")
            self._ours = model.train()
        return self._ours

    def add_task(self, name: str) -> None:
        """Another adapter with the same prompts."""
        self.ours().add_adapter(name, self._config())
        self._start(self.ours(), name)

    def restart(self) -> None:
        """Bring our prompts back to where they started: steps that were timed have trained them."""
        if self._ours is not None:
            with torch.no_grad():
                for name in self._ours.adapters:
                    self.prompts_of(name).copy_(self.prompts.deep)

    def prompts_of(self, name: str = "default") -> Tensor:
        """The trained parameter of an adapter of ours, (L, P, D)."""
        return self.ours().adapters[name].encoder.prompts

    def _config(self) -> PTuningV2Config:
        options = {"num_virtual_tokens": self.prompts.deep.shape[1], "backend": self.backend}
        if self.case.causal:
            return PTuningV2Config("CAUSAL_LM", **options)
        if self.case.peers == "tasks":
            # Rows of several tasks give hidden states; one task has a head of its own.
            return PTuningV2Config("FEATURE_EXTRACTION", **options)
        return PTuningV2Config("SEQ_CLS", heads={"task": HeadConfig("SEQ_CLS", 2)}, **options)

    def _start(self, model: nn.Module, name: str) -> None:
        adapter = model.adapters[name]
        with torch.no_grad():
            adapter.encoder.prompts.copy_(self.prompts.deep)
            for head in adapter.heads.values():
                head.linear.weight.copy_(head_of(self.base))
        adapter.requires_grad_(False)
        adapter.encoder.prompts.requires_grad_(True)


def step_providers() -> list[StepProvider]:
    """Everyone; those whose setup moves weights come before those that record where weights are.

    Compiled ones come last, those that goals compare with before the others: a run may be short.
    """
    everyone = [*_our_providers(), *_peft_providers(), *_floor_providers(), *_literal_providers()]
    order = {"peft_compiled": 2, "floor_compiled": 3}
    return sorted(everyone, key=lambda p: order.get(p.name, 4) if p.compiles and not p.ours else int(p.compiles))


# Ours

_DEFAULTS = {
    "ours": "StepOptions(cuda_graphs=False), the defaults of an eager step",
    "ours_captured": "StepOptions(), the defaults: forward and backward captured by the model's own forward",
}


def rungs() -> list[tuple[str, StepOptions]]:
    """The ladder: every switch off, then one more on at each rung in the order of `StepOptions`, then the defaults."""
    # Captures are for providers of their own, and float8 computes something else.
    names = [field.name for field in fields(StepOptions) if field.name not in ("cuda_graphs", "float8")]
    ladder = []
    eager = StepOptions(cuda_graphs=False)
    for count in range(len(names) + 1):
        options = StepOptions(**{name: place < count for place, name in enumerate(names)}, cuda_graphs=False)
        ladder.append((f"ours_{count}_{names[count - 1] if count else 'plain'}", options))
    return [*ladder, ("ours", eager), ("ours_captured", StepOptions())]


def _our_providers() -> list[StepProvider]:
    ladder = [
        StepProvider(
            name,
            f"{_OURS} with step_options={_DEFAULTS.get(name, options)}",
            "deep",
            _no_layer_compiler if options.compile_layers else _no_refusal if name != "ours_captured" else _no_capture,
            _build_rung(options),
            ours=True,
            compiles=bool(options.compile_layers),
            peers=(*EVERY, "tasks") if name == "ours" else ("compiled",) if options.compile_layers else EVERY,
        )
        for name, options in rungs()
    ]
    return [
        *ladder,
        StepProvider(
            "ours_p0",
            "the same model with inputs_embeds=embeddings.detach().requires_grad_() and adapter_names=['__base__'] * B:"
            " our stack without a prompt",
            "plain",
            _no_refusal,
            _build_without_prompt,
            ours=True,
        ),
        StepProvider(
            "ours_graph",
            f"{_RUNNER}; StepOptions(), the defaults",
            "deep",
            _no_runner,
            _build_graph(StepOptions()),
            ours=True,
        ),
        StepProvider(
            "ours_graph_compiled",
            f"{_RUNNER}; StepOptions(compile_layers=True)",
            "deep",
            lambda case, device: _no_runner(case, device) or _no_layer_compiler(case, device),
            _build_graph(StepOptions(compile_layers=True)),
            ours=True,
            compiles=True,
            peers=("compiled",),
        ),
        StepProvider(
            f"ours_tasks{TASKS}",
            f"the same model with {TASKS} adapters and adapter_names= naming another one in each row",
            "deep",
            _no_refusal,
            _build_tasks,
            ours=True,
            peers=("tasks",),
        ),
    ]


def _build_rung(options: StepOptions):
    def build(kit: Kit) -> Bound:
        model = kit.ours()
        prompt = kit.prompts_of()

        def arm() -> None:
            model.step_options = options
            # A captured step on the same prompt leaves its gradient behind.
            prompt.grad = None

        return Bound(model, _our_loss(kit), _tensors_of, [prompt], lambda arguments: prompt.grad, arm)

    return build


def _our_loss(kit: Kit, adapter_names: list[str] | None = None):
    model, head = kit.ours(), head_of(kit.base)
    options = {} if adapter_names is None else {"adapter_names": adapter_names}
    if kit.case.peers != "tasks":
        return lambda ids, mask, labels: model(ids, mask, labels=labels, **options).loss
    return lambda ids, mask, labels: task_loss(kit.base, model(ids, mask, **options).last_hidden_state, labels, head)


def _tensors_of(batch: Batch):
    return batch.input_ids, batch.attention_mask, batch.labels


def _build_without_prompt(kit: Kit) -> Bound:
    model, head = kit.ours(), head_of(kit.base)
    plain = plain_form(kit.base)

    def arm() -> None:
        model.step_options = StepOptions()

    def forward(embeddings, mask, labels):
        names = [BASE_ROW] * len(embeddings)
        if kit.case.causal:
            return model(inputs_embeds=embeddings, attention_mask=mask, labels=labels, adapter_names=names).loss
        inputs = {"inputs_embeds": embeddings, "attention_mask": mask}
        rows, tokens = embeddings.shape[:2]
        first = torch.arange(rows, device=embeddings.device) * tokens
        states = model.run(model.backbone, inputs, names, read=first)
        return task_loss(kit.base, states.last_hidden_state, labels, head)

    return Bound(model, forward, plain.prepare, [], plain.gradient, arm)


def _build_tasks(kit: Kit) -> Bound:
    names = ["default", *(f"task{i}" for i in range(1, TASKS))]
    for name in names[1:]:
        kit.add_task(name)
    trained = [kit.prompts_of(name) for name in names]

    def gradient(arguments) -> Tensor:
        # Every task starts from the same prompt, so the sum is what one prompt for all rows would get.
        return sum(prompt.grad for prompt in trained)

    def arm() -> None:
        kit.ours().step_options = StepOptions()

    rows = [names[row % TASKS] for row in range(kit.case.B)]
    return Bound(kit.ours(), _our_loss(kit, rows), _tensors_of, trained, gradient, arm)


def _build_graph(options: StepOptions):
    def build(kit: Kit) -> Bound:
        from ptv2_fast.step.graph_runner import GraphRunner

        model, prompt = kit.ours(), kit.prompts_of()
        # With a rate of 0 the steps that are judged leave the prompt as it is.
        optimizer = torch.optim.AdamW([prompt], lr=0.0, fused=kit.device.type == "cuda")
        runner = GraphRunner(model, optimizer)

        def forget() -> None:
            nonlocal runner
            runner = GraphRunner(model, optimizer)

        def prepare(batch: Batch):
            # The runner packs on the host and copies to the device, in the timing.
            tensors = (batch.input_ids, batch.attention_mask, batch.labels)
            return tuple(x.cpu() for x in tensors)

        def take(ids, mask, labels):
            return runner.step({"input_ids": ids, "attention_mask": mask, "labels": labels})

        def learn(rate: float) -> None:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

        def arm() -> None:
            model.step_options = options

        # Two eager steps, one that is captured, one replay.
        return Bound(
            model, take, prepare, [prompt], lambda arguments: prompt.grad, arm, settle=4, take=take, learn=learn,
            facts=lambda: {"captured": runner.captured}, forget=forget,
        )  # fmt: skip

    return build


def _no_capture(case: StepCase, device: torch.device) -> str | None:
    return None if device.type in CAPTURES else f"a forward is captured on CUDA, not on {device.type}"


def _no_runner(case: StepCase, device: torch.device) -> str | None:
    found = importlib.util.find_spec("ptv2_fast.step.graph_runner")
    return None if found is not None else "there is no ptv2_fast.step.graph_runner"


# The literal form


def _literal_providers() -> list[StepProvider]:
    call = "h = layer(cat([prompt.expand(B, -1, -1), h], 1), mask)[:, P:] for every layer; mask built before; "
    return [
        StepProvider(
            "literal_sdpa", call + "attn_implementation='sdpa'", "deep", _no_refusal,
            lambda kit: deep_form(kit.base, kit.prompts),
        ),
        StepProvider(
            "literal_eager", call + "attn_implementation='eager'", "deep", _no_refusal,
            lambda kit: deep_form(kit.base, kit.prompts, attention="eager"),
        ),
        StepProvider(
            "literal_compiled", _COMPILED + "literal_sdpa", "deep", _no_compiler,
            lambda kit: compiled(deep_form(kit.base, kit.prompts), kit), compiles=True, peers=("compiled",), extra=True,
        ),
    ]  # fmt: skip


# Prefixes: PEFT, and what PyTorch alone can do


def _peft_providers() -> list[StepProvider]:
    joined = "keys and values joined inside attention through transformers' attention interface, mask built before; "
    return [
        StepProvider("peft", f"{_PEFT}, attn_implementation='sdpa'", "prefix", _no_peft, _build_peft),
        StepProvider(
            "peft_compiled", _COMPILED + "peft", "prefix",
            lambda case, device: _no_peft(case, device) or _no_compiler(case, device),
            lambda kit: compiled(_build_peft(kit), kit), compiles=True, peers=("compiled",),
        ),
        StepProvider(
            "joined_sdpa", joined + "F.scaled_dot_product_attention", "prefix", _no_refusal,
            lambda kit: prefix_form(kit.base, kit.prompts),
        ),
        StepProvider(
            "joined_flex", joined + "torch.compile(flex_attention, dynamic=False) with a prebuilt block mask", "prefix",
            _no_flex, _build_flex, compiles=True, peers=("compiled",), extra=True,
        ),
    ]  # fmt: skip


def _build_peft(kit: Kit) -> Bound:
    from peft import PrefixTuningConfig, get_peft_model

    base, causal = twin(kit.base), kit.case.causal
    task = "CAUSAL_LM" if causal else "FEATURE_EXTRACTION"
    depth, _, heads, length, size = kit.prompts.prefix.shape
    with warnings.catch_warnings():
        # PEFT asks transformers questions by names that are about to go.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, PrefixTuningConfig(task_type=task, num_virtual_tokens=length)).train()
    # PEFT leaves these on the CPU, which keeps torch.compile from using CUDA graphs.
    model.prompt_tokens["default"] = model.prompt_tokens["default"].to(kit.device)
    weight = model.prompt_encoder["default"].embedding.weight
    expected = (length, 2 * depth * heads * size)
    if tuple(weight.shape) != expected:
        raise ValueError(f"PEFT's prefix must have shape {expected}; got {tuple(weight.shape)}")
    with torch.no_grad():
        # A token's values are ordered by layer, key before value, head.
        weight.copy_(kit.prompts.prefix.permute(3, 0, 1, 2, 4).reshape(expected))
    head = head_of(kit.base)

    def forward(ids, mask, labels):
        if causal:
            return model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return task_loss(kit.base, model(input_ids=ids, attention_mask=mask).last_hidden_state, labels, head)

    def gradient(arguments) -> Tensor:
        return weight.grad.view(length, depth, 2, heads, size).permute(1, 2, 3, 0, 4)

    return Bound(model, forward, _tensors_of, [weight], gradient)


def _build_flex(kit: Kit) -> Bound:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from benchmarks.attention.flex import compile_shape

    attend = flex_attention if kit.device.type == "cpu" else compile_shape(flex_attention)

    def call(q, k, v, mask, dropout_p, scale):
        return attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    def prepare_mask(batch: Batch, length: int, causal: bool):
        if not causal and not batch.padded:
            return None
        lengths = batch.attention_mask.sum(1)

        def visible(row, head, query, slot):
            key = slot - length
            seen = key < lengths[row]
            return (slot < length) | (seen & (key <= query) if causal else seen)

        rows, count = batch.input_ids.shape
        return create_block_mask(visible, rows, None, count, length + count, device=batch.input_ids.device)

    return prefix_form(kit.base, kit.prompts, attend=call, prepare_mask=prepare_mask)


# The floor


def _floor_providers() -> list[StepProvider]:
    call = "base(inputs_embeds=embeddings.detach().requires_grad_(), attention_mask=, labels=), sdpa, nothing trained"
    return [
        StepProvider("floor", call, "plain", _no_refusal, lambda kit: plain_form(kit.base)),
        StepProvider(
            "floor_compiled", _COMPILED + "floor", "plain", _no_compiler,
            lambda kit: compiled(plain_form(kit.base), kit), compiles=True, peers=("compiled",),
        ),
    ]  # fmt: skip


def compiled(bound: Bound, kit: Kit) -> Bound:
    """The same with forward and loss, and so their backward, compiled as one graph."""
    options = {"backend": "aot_eager"} if kit.tiny else {"mode": "reduce-overhead"}
    # Every form is another code object; one compilation for each shape and padding of a cell.
    forward = torch.compile(bound.forward, dynamic=False, **options)
    return Bound(bound.model, forward, bound.prepare, bound.trained, bound.gradient, compiled=True, settle=3)


# Reasons


def _no_refusal(case: StepCase, device: torch.device) -> str | None:
    return None


def _no_compiler(case: StepCase, device: torch.device) -> str | None:
    if device.type != "cuda" and not case.model.startswith("tiny"):
        return "CUDA graphs of a compiled step need a CUDA device"
    return "dropout's random numbers are compiled away from eager's: compared in eager only" if case.dropout else None


def _no_layer_compiler(case: StepCase, device: torch.device) -> str | None:
    cpu = device.type == "cpu" and not case.model.startswith("tiny")
    return "compiling layers for the CPU takes longer than the rest of the run" if cpu else None


def _no_peft(case: StepCase, device: torch.device) -> str | None:
    return None if importlib.util.find_spec("peft") is not None else "peft is not installed"


def _no_flex(case: StepCase, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its CPU form has no backward pass: needs a CUDA device"
    return "FlexAttention has no dropout" if case.dropout else None
