"""What a forward pass carries to every attention layer: the prompts as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerPrompt:
    """The prompt of one layer, as keys and values.

    Attributes:
        keys, values: (Hkv, P, D) shared by the whole batch, or a bank (R, Hkv, P, D).
        bias: (H, P) or (R, H, P), added to the prompt's scores; None where there is no gate.
        lens: (R,) number of valid tokens of each bank entry; None where all P are.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    lens: Tensor | None = None


class LazyPrompt:
    """The prompt of a layer whose weights are there only while the layer runs: made each time that it asks.

    Nothing is kept between two calls, so that a recomputation in backward makes what the forward pass made.
    """

    def __init__(self, make: Callable[[], LayerPrompt]):
        self.make = make


@dataclass
class Checked:
    """Arguments of attention that are right, and what a backend has found out about all layers that have the like.

    Attributes:
        backend: which one serves them.
        shared: the objects that those have in common: that they are kept keeps their identities theirs.
        seen: what queries see according to the torch backend, and the version of the key mask that it looked at; None
            where it has not.
    """

    backend: str
    shared: tuple[Any, ...]
    seen: tuple[Any, int | None] | None = None


class Account:
    """What is known of one forward pass; one object for all copies of its batch.

    Attributes:
        layers: which have asked for their prompt.
        times: how often any did.
        checked: arguments of attention that were found right, by what `attention.layer` compares.
    """

    def __init__(self) -> None:
        self.layers: set[int] = set()
        self.times = 0
        self.checked: dict[tuple[Any, ...], Checked] = {}


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one forward pass, given to the model as the keyword argument `ptv2_prompts`.

    It travels through the model's own keyword arguments, so that no module holds state: two models,
    two threads and a recomputation in backward cannot see each other's prompts.

    Attributes:
        layers: one entry per attention layer, None where the layer has no prompt; a single entry serves whichever
            layer asks; none at all is no prompt anywhere. A lazy one is made when its layer asks.
        index: (B,) or packed (S,): the bank entry of each row; None where all rows share one
            prompt.
        cu_seqlens: (S + 1,) int32 row boundaries when the batch is packed: its (B, N) tokens,
            flattened, are S rows.
        max_seqlen: the longest packed row, where known.
        backend: which backend of `prompt_attention` serves it.
        windowed: the layers' sliding windows apply; False where the rows are virtual tokens themselves, which every
            query sees.
        asked: where the index of every layer that asks for its prompt is noted; None keeps no account.
    """

    layers: tuple[LayerPrompt | LazyPrompt | None, ...]
    index: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    backend: str = "auto"
    windowed: bool = True
    asked: Account | None = None

    def at(self, layer: int) -> PromptBatch:
        """The batch for one layer alone: its attention need not know which layer it is."""
        self._note(layer)
        return replace(self, layers=self.layers[layer : layer + 1], asked=None)

    def of(self, module: nn.Module) -> LayerPrompt | None:
        """The prompt of an attention module, by its `prompt_layer` where it has one, else by its `layer_idx`."""
        if not self.layers:
            self._note(None)
            return None
        index = 0
        if len(self.layers) > 1:
            own: int | None = module.__dict__.get("prompt_layer")  # a view's
            index = module.layer_idx if own is None else own
        self._note(index)
        prompt = self.layers[index]
        return prompt.make() if isinstance(prompt, LazyPrompt) else prompt

    def check_reached(self, base: str, layers: int) -> None:
        """Check that every layer that has a prompt asked for it, and that all `layers` asked, where an account is kept.

        Raises:
            RuntimeError: a layer did not: its prompt had no effect, or its attention was not ours.
        """
        if self.asked is None:
            return
        missing = [i for i, prompt in enumerate(self.layers) if prompt is not None and i not in self.asked.layers]
        if missing:
            raise RuntimeError(not_reached(base, f"layers {missing}"))
        if self.asked.times < layers:
            raise RuntimeError(not_reached(base, f"{layers - self.asked.times} of its layers"))

    def _note(self, layer: int | None) -> None:
        if self.asked is not None:
            self.asked.times += 1
            if layer is not None:
                self.asked.layers.add(layer)


def not_reached(base: str, layers: str) -> str:
    """What to say where a model runs layers without their prompts."""
    return (
        "base must hand the keyword argument ptv2_prompts on to every attention layer, and run it as a part of the "
        f"model that it is; {base} did not reach {layers}, whose prompts have no effect"
    )
