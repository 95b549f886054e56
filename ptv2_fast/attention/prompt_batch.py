"""What a forward pass carries to every attention layer: the prompts as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one forward pass, given to the model as the keyword argument `ptv2_prompts`.

    It travels through the model's own keyword arguments, so that no module holds state: two models,
    two threads and a recomputation in backward cannot see each other's prompts.

    Attributes:
        layers: one entry per attention layer, None where the layer has no prompt; a single entry serves whichever
            layer asks; none at all is no prompt anywhere.
        index: (B,) or packed (S,): the bank entry of each row; None where all rows share one
            prompt.
        cu_seqlens: (S + 1,) int32 row boundaries when the batch is packed: its (B, N) tokens,
            flattened, are S rows.
        max_seqlen: the longest packed row, where known.
        backend: which backend of `prompt_attention` serves it.
        windowed: the layers' sliding windows apply; False where the rows are virtual tokens themselves, which every
            query sees.
    """

    layers: tuple[LayerPrompt | None, ...]
    index: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    backend: str = "auto"
    windowed: bool = True

    def at(self, layer: int) -> PromptBatch:
        """The batch for one layer alone: its attention need not know which layer it is."""
        return replace(self, layers=self.layers[layer : layer + 1])

    def of(self, module: nn.Module) -> LayerPrompt | None:
        """The prompt of an attention module, by its `layer_idx`."""
        if len(self.layers) > 1:
            return self.layers[module.layer_idx]
        return self.layers[0] if self.layers else None
