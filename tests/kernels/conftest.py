"""What the kernel tests share: devices and dtypes, poisoned outputs, cases, and the one place that owns tolerances."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import pytest
import torch

from ptv2_fast.attention import torch_backend
from ptv2_fast.kernels import launch
from ptv2_fast.kernels.dropout import dropout_keep_mask
from ptv2_fast.kernels.prompt_backward import Needs, prompt_attention_backward
from ptv2_fast.kernels.prompt_forward import prompt_attention_forward
from ptv2_fast.reference.attention import prompt_attention as reference

HAS_GPU = torch.cuda.is_available()
# A GPU gets the same cases with sizes multiplied, and bfloat16, which the interpreter cannot multiply.
TOKENS_FACTOR = 9 if HAS_GPU else 1
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_GPU else [])

GRADIENT_NAMES = ("q", "k", "v", "prompt_k", "prompt_v", "prompt_bias")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: natively on a GPU, else interpreted on the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    """Every dtype the device can judge."""
    return request.param


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """Fresh memory holds NaN (or -1), so that an element no kernel wrote cannot pass for a result."""

    def poisoned(shape, dtype, device):
        return torch.full(tuple(shape), float("nan") if dtype.is_floating_point else -1, dtype=dtype, device=device)

    def poisoned_strided(shape, strides, dtype, device):
        reach = (
            1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
        )
        return poisoned((reach,), dtype, device).as_strided(shape, strides)

    monkeypatch.setattr(launch, "allocate", poisoned)
    monkeypatch.setattr(launch, "allocate_strided", poisoned_strided)


class ErrorBudget:
    """How far a kernel may be from float64 truth.

    float32: relative error (Frobenius) below 1e-5. 16 bits: at most twice the error of PyTorch's SDPA in the same dtype
    on the same inputs, or float32's where SDPA is exact. Errors are relative to the truth, or, where the truth cancels
    to almost nothing (a softmax over one key has no gradient), to FLOOR an element.
    """

    FLOOR = 0.05

    FLOAT32 = 1e-5
    FACTOR_16 = 2.0

    @staticmethod
    def error(value: torch.Tensor, truth: torch.Tensor) -> float:
        """|value - truth| / |truth|, in float64."""
        assert value.shape == truth.shape
        value, truth = value.detach(), truth.detach()
        difference = (value.double() - truth.double()).norm()
        floor = ErrorBudget.FLOOR * max(1, truth.numel()) ** 0.5
        return float(difference / truth.double().norm().clamp_min(floor))

    def check(self, name: str, value: torch.Tensor, truth: torch.Tensor, baseline: torch.Tensor | None) -> None:
        """Fail when `value` is further from `truth` than allowed; baseline is SDPA's result in value's dtype."""
        error = self.error(value, truth)
        if value.dtype == torch.float32 or baseline is None:
            allowed = self.FLOAT32
        else:
            allowed = max(self.FLOAT32, self.FACTOR_16 * self.error(baseline, truth))
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"

    def check_same(self, name: str, value: torch.Tensor, expected: torch.Tensor) -> None:
        """Fail when two versions of a kernel that do the same float32 arithmetic differ.

        Interpreted they agree in every bit. A card's compiler may fuse a multiplication and an addition in one version
        and not in the other.
        """
        if HAS_GPU:
            self.check(name, value, expected, None)
        else:
            assert torch.equal(value, expected), name


@pytest.fixture(scope="session")
def budget() -> ErrorBudget:
    """The tolerances."""
    return ErrorBudget()


@dataclass
class Case:
    """One call of prompt attention, drawn at random; sizes are small on the CPU and multiplied on a GPU."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 1
    queries: int = 37
    keys: int | None = None
    prompt: int = 5
    head_dim: int = 16
    entries: int = 1
    lens: tuple[int, ...] | None = None
    mask: str | None = None
    packed: tuple[int, ...] | None = None
    bias: tuple[int, int] | None = None
    prompt_bias: bool = False
    layout: str = "heads"
    scaled: bool = True
    options: dict[str, object] = field(default_factory=dict)

    def build(self, dtype: torch.dtype, device: torch.device) -> Call:
        """Random inputs of the case."""
        factor = TOKENS_FACTOR if self.scaled else 1
        queries = self.queries * factor
        keys = queries if self.keys is None else self.keys * factor
        lengths = None if self.packed is None else [length * factor for length in self.packed]

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).to(dtype)

        def heads(count: int, tokens: int) -> torch.Tensor:
            if lengths is not None:
                return random(sum(lengths), count, self.head_dim)
            match self.layout:
                case "contiguous":
                    return random(self.batch, count, tokens, self.head_dim)
                case "columns":  # the head axis is not the innermost in memory
                    return random(self.batch, count, self.head_dim, tokens).transpose(2, 3)
                case "expanded":  # one row for the whole batch, stride 0
                    return random(1, tokens, count, self.head_dim).transpose(1, 2).expand(self.batch, -1, -1, -1)
                case _:  # as models hand it over
                    return random(self.batch, tokens, count, self.head_dim).transpose(1, 2)

        arguments: dict[str, object] = {"scale": self.head_dim**-0.5, "causal": False, **self.options}
        tensors = [heads(self.heads, queries), heads(self.kv_heads, keys), heads(self.kv_heads, keys)]
        bank = (self.entries, self.kv_heads, self.prompt, self.head_dim)
        tensors += [random(*bank), random(*bank)]
        rows = self.batch if lengths is None else len(lengths)
        if self.prompt_bias:
            tensors.append(random(self.entries, self.heads, self.prompt))
        if self.entries > 1:
            # Every entry but the last is used; one that no row uses must get zero gradients.
            arguments["prompt_index"] = (torch.arange(rows, device=device) * 7) % (self.entries - 1)
        if self.lens is not None:
            arguments["prompt_lens"] = torch.tensor(self.lens, dtype=torch.int32, device=device)
        if self.mask is not None:
            arguments["key_mask"] = key_mask(self.mask, self.batch, keys).to(device)
        if lengths is not None:
            arguments["cu_seqlens"] = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
            arguments["max_seqlen"] = max(lengths)
        if self.bias is not None:
            bias = random(*self.bias, queries, keys)
            arguments["bias"] = bias.masked_fill(torch.rand(bias.shape, device=device) < 0.2, float("-inf"))
        if arguments.get("dropout_p"):
            arguments["seed"] = torch.randint(0, 2**62, (1,), device=device)
        return Call(tensors, arguments)


def key_mask(kind: str, batch: int, keys: int) -> torch.Tensor:
    """(B, M) masks as tokenizers make them: int64, or bool for holes."""
    position = torch.arange(keys)
    lengths = torch.linspace(keys, max(1, keys // 3), batch).long()[:, None]
    match kind:
        case "right":
            return (position < lengths).long()
        case "left":
            return (position >= keys - lengths).long()
        case "holes":
            return torch.rand(batch, keys) < 0.6
        case "none-in-row-0":
            return (position < lengths).long() * (torch.arange(batch) > 0).long()[:, None]
        case "nothing":
            return torch.zeros(batch, keys, dtype=torch.long)
    raise ValueError(f"kind must name a mask; got {kind!r}")


@dataclass
class Call:
    """Inputs of one call: the differentiable tensors q, k, v, prompt_k, prompt_v[, prompt_bias], and the rest."""

    tensors: list[torch.Tensor]
    arguments: dict[str, object]

    @property
    def packed(self) -> bool:
        """Whether the rows are packed along one token axis."""
        return self.arguments.get("cu_seqlens") is not None

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(o, lse) of the forward kernel."""
        return prompt_attention_forward(*self.tensors[:5], **self._kernel_arguments())

    def kernel_gradients(self, grad_output, output, lse, needs: Needs | None = None, **choices):
        """Gradients of the backward kernels; choices: config, by_rows."""
        if needs is None:
            needs = Needs(query=True, text=True, prompt=True, prompt_bias=len(self.tensors) > 5)
        return prompt_attention_backward(
            grad_output, *self.tensors[:5], output, lse, needs=needs, **choices, **self._kernel_arguments()
        )

    def gradients_by_rows(self, grad_output, output, lse):
        """The same by the kernel that owns whole rows; None where rows are too long for it."""
        q, k = self.tensors[:2]
        longest = self.arguments["max_seqlen"] if self.packed else max(q.shape[2], k.shape[2])
        if longest > 128 or q.shape[-1] > 128:
            return None
        # Heads that share keys want them in one tile, which is larger than the interpreter's.
        config = None if q.shape[1] == k.shape[1] else launch.LaunchConfig(128, 128, 4, 1)
        needs = Needs(query=True, text=True, prompt=True)
        return self.kernel_gradients(grad_output, output, lse, needs, by_rows=True, config=config)

    def _kernel_arguments(self) -> dict[str, object]:
        bias = {"prompt_bias": self.tensors[5]} if len(self.tensors) > 5 else {}
        return {**self.arguments, **bias}

    def truth(self, grad_output: torch.Tensor | None = None):
        """The reference in float64: (o, lse), or the gradients for grad_output."""
        function = replayed_dropout(self) if self.arguments.get("dropout_p") else reference
        return self._judge(function, torch.float64, grad_output)

    def baseline(self, grad_output: torch.Tensor | None = None):
        """PyTorch's SDPA in the inputs' own dtype; with dropout, the reference, which can replay a mask."""
        function = replayed_dropout(self) if self.arguments.get("dropout_p") else sdpa
        return self._judge(function, self.tensors[0].dtype, grad_output)

    def _judge(self, function, dtype, grad_output):
        inputs = [tensor.to(dtype).detach().requires_grad_(grad_output is not None) for tensor in self.tensors]
        arguments = {name: value for name, value in self.arguments.items() if name != "seed"}
        if arguments.get("bias") is not None:
            arguments["bias"] = arguments["bias"].to(dtype)
        if len(inputs) > 5:
            arguments["prompt_bias"] = inputs[5]
        output, lse = function(*inputs[:5], **arguments, return_lse=True)
        if grad_output is None:
            return output, lse
        return torch.autograd.grad(output, inputs, grad_output.to(dtype), allow_unused=True)

    def bias_truth(self, grad_output: torch.Tensor) -> torch.Tensor:
        """The gradient of `bias` by the reference in float64."""
        bias = self.arguments["bias"].double().requires_grad_()
        function = replayed_dropout(self) if self.arguments.get("dropout_p") else reference
        inputs = [tensor.double() for tensor in self.tensors]
        arguments = {name: value for name, value in self.arguments.items() if name != "seed"} | {"bias": bias}
        if len(inputs) > 5:
            arguments["prompt_bias"] = inputs[5]
        output, _ = function(*inputs[:5], **arguments, return_lse=True)
        return torch.autograd.grad(output, bias, grad_output.double())[0]


def sdpa(*tensors, **arguments):
    """The torch backend, which wants every argument named."""
    optional = (
        "key_mask",
        "cu_seqlens",
        "max_seqlen",
        "prompt_index",
        "prompt_lens",
        "prompt_bias",
        "bias",
        "window",
        "softcap",
    )
    return torch_backend.prompt_attention(*tensors, **{**dict.fromkeys(optional), "dropout_p": 0.0, **arguments})


def replayed_dropout(call: Call):
    """The reference with the kernels' own keep mask for `call`; packed rows one by one, each with its part of it."""
    heads, prompt_length = call.tensors[0].shape[-2 if call.packed else 1], call.tensors[3].shape[2]
    dropout_p, seed = call.arguments["dropout_p"], call.arguments["seed"]
    if not call.packed:
        rows, _, queries, _ = call.tensors[0].shape
        keep = dropout_keep_mask(rows, heads, queries, prompt_length + call.tensors[1].shape[2], dropout_p, seed)
        return functools.partial(reference, dropout_keep=keep)
    longest = call.arguments["max_seqlen"]
    bounds = call.arguments["cu_seqlens"].tolist()
    keep = dropout_keep_mask(len(bounds) - 1, heads, longest, prompt_length + longest, dropout_p, seed)

    def by_rows(q, k, v, *prompt, cu_seqlens, max_seqlen, prompt_index, **arguments):
        outputs, lses = [], []
        for row, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            dense = (tensor[start:end].transpose(0, 1)[None] for tensor in (q, k, v))
            row_keep = keep[row : row + 1, :, : end - start, : prompt_length + end - start]
            output, lse = reference(
                *dense, *prompt, prompt_index=prompt_index[row : row + 1], dropout_keep=row_keep, **arguments
            )
            outputs.append(output[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.cat(outputs), torch.cat(lses, 1)

    return by_rows


# The name says what the case is about. Sizes are odd on purpose: one off a tile border, both sides.
CASES = {
    "plain": Case(),
    "N1-P0": Case(queries=1, prompt=0),
    "N17-P1": Case(queries=17, prompt=1, layout="contiguous"),
    "N63-P100-causal": Case(batch=1, queries=63, prompt=100, options={"causal": True}),
    "N65-P5-causal-gqa": Case(batch=1, heads=4, kv_heads=2, queries=65, options={"causal": True}),
    "N127-P33": Case(batch=1, heads=1, queries=127, prompt=33),
    "N129-P0-causal": Case(batch=1, heads=1, queries=129, prompt=0, options={"causal": True}),
    "N3-P1000": Case(queries=3, prompt=1000),
    "N5-M70-causal": Case(queries=5, keys=70, options={"causal": True}),
    "N40-M17-causal-P0": Case(batch=1, queries=40, keys=17, prompt=0, options={"causal": True}),
    "window": Case(batch=1, queries=97, options={"window": 9}),
    "window-causal": Case(batch=1, queries=97, options={"window": 40, "causal": True}),
    "mask-right": Case(mask="right", queries=65),
    "mask-left-causal": Case(mask="left", queries=65, options={"causal": True}),
    "mask-holes-window": Case(mask="holes", queries=65, options={"window": 20}),
    "mask-none-in-row-0": Case(mask="none-in-row-0"),
    "mask-nothing-P0": Case(mask="nothing", prompt=0),
    "softcap-biases": Case(bias=(1, 2), prompt_bias=True, options={"softcap": 2.0}),
    "bank-lens": Case(batch=4, queries=17, prompt=33, entries=3, lens=(0, 33, 7), prompt_bias=True, bias=(4, 1)),
    "packed": Case(packed=(5, 0, 33, 17), options={"causal": True}),
    "packed-bank-window": Case(packed=(5, 33, 17), entries=3, lens=(3, 5, 4), options={"window": 4}),
    "columns": Case(layout="columns"),
    "expanded": Case(layout="expanded", heads=4, kv_heads=4),
    "D80": Case(batch=1, head_dim=80),
    "D192-causal": Case(batch=1, queries=33, head_dim=192, options={"causal": True}),
    "dropout": Case(options={"dropout_p": 0.3}),
    "dropout-packed-causal": Case(packed=(20, 0, 33), entries=2, options={"dropout_p": 0.2, "causal": True}),
}
# 16-bit tensors take the same road; these cases visit every kernel and both orientations of a tile. On a GPU, where
# each case is another second of compiling, bfloat16 takes them all and float16 these.
WHOLE = (torch.float32, torch.bfloat16)
SHORT = ("plain", "N63-P100-causal", "softcap-biases", "packed-bank-window")


def pytest_generate_tests(metafunc):
    """Give tests that ask for `call` each case in float32 (on a GPU also in bfloat16), and a few in float16."""
    if "call" in metafunc.fixturenames:
        params = [
            pytest.param((case, dtype), id=f"{name}-{str(dtype).removeprefix('torch.')}")
            for name, case in CASES.items()
            for dtype in DTYPES
            if dtype in WHOLE or name in SHORT
        ]
        metafunc.parametrize("call", params, indirect=True)


@pytest.fixture
def call(request, device) -> Call:
    """One drawn call of a named case."""
    case, dtype = request.param
    return case.build(dtype, device)


@pytest.fixture
def make_call(device):
    """Draw a call of a case given by keywords, float32 unless told."""

    def make(dtype: torch.dtype = torch.float32, **options) -> Call:
        return Case(**options).build(dtype, device)

    return make
