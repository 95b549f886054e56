"""The tutorial "A Deep Dive into P-Tuning v2": its two classes, with prompts that only attention sees.

Where it writes expand, concat, layer and slice, a `ptv2_fast.PTuningV2Model` runs the base: prompts enter as keys and
values, padding is left out of a training step where that saves time, and the last layer computes the [CLS] rows alone
where they alone are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from ptv2_fast.adapter import Adapter
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.backbone.sharded_weights import device_of
from ptv2_fast.config import PTuningV2Config
from ptv2_fast.families.dimensions import Dimensions
from ptv2_fast.families.registry import family_of
from ptv2_fast.inputs.features import reads_text
from ptv2_fast.inputs.pooling import pool, tokens_read
from ptv2_fast.model import PTuningV2Model
from ptv2_fast.prompts.encoder import PromptEncoder
from ptv2_fast.tutorials.sizes import check_sizes

M = TypeVar("M", bound="P_Tuning_Model")


class DeepPromptEncoder(nn.Module):
    """Trained prompts for every layer: `prompts` are num_layers embeddings of (prompt_length, hidden_dim).

    They start as nn.Embedding does, normal with deviation 1, and are made on the CPU: a seed gives the tutorial's own.

    Args:
        num_layers: L.
        hidden_dim: D.
        prompt_length: P.
        device: where they are put.

    Raises:
        ValueError: a size is not a positive integer.

    Example:
        ```python
        from ptv2_fast.tutorials import DeepPromptEncoder

        prompts = DeepPromptEncoder(num_layers=2, hidden_dim=32, prompt_length=5, device="cpu")
        assert prompts(1).shape == (5, 32)
        ```
    """

    def __init__(self, num_layers: int, hidden_dim: int, prompt_length: int, device: torch.device | str) -> None:
        super().__init__()
        check_sizes(num_layers=num_layers, hidden_dim=hidden_dim, prompt_length=prompt_length)
        self.prompt_length = prompt_length
        self.prompts = nn.ModuleList(nn.Embedding(prompt_length, hidden_dim) for _ in range(num_layers))
        self.to(device)

    @property
    def device(self) -> str:
        """Where the prompts are; the tutorial's is set by whoever moves it, which changes nothing here."""
        return str(self.prompts[0].weight.device)

    @device.setter
    def device(self, device: torch.device | str) -> None:
        torch.device(device)  # refuses what is none

    def forward(self, layer_idx: int) -> Tensor:
        """The prompts of one layer, (P, D): the parameter itself."""
        return self.prompts[layer_idx].weight


class P_Tuning_Model(nn.Module):
    """A frozen encoder with deep prompts and one trained head per task.

        h[i + 1] = layer[i]([prompts[i] ; h[i]])[P:]
        logits = classification_heads[task_idx](h[L])

    The tutorial hands each layer a mask of ones and zeros, which hides nothing; here padding is hidden. Positions and
    the [CLS] row follow each row's first real token, which makes left padding and right padding the same.

    The state dict has the tutorial's names: `base_model.*`, `prompt_encoder.prompts.{i}.weight`,
    `classification_heads.{i}.weight` and `.bias`. `prompt_encoder` may be set to another one of the same sizes, and
    `classification_heads` to others; `base_model` stays.

    Args:
        base_model_name: name or folder of an encoder of any family that ptv2_fast serves, for AutoModel; it goes to the
            GPU where there is one. Or such a model, which stays where it is. Its parameters are frozen.
        prompt_length: P, the prompts of each layer.
        num_labels_list: the number of labels of each task, in the order of `task_idx`.

    Raises:
        ValueError: a size is not a positive integer, there is no task, or the base is no encoder of texts.

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertModel

        from ptv2_fast.tutorials import P_Tuning_Model

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = P_Tuning_Model(base, prompt_length=5, num_labels_list=[3, 2])
        ids = torch.tensor([[101, 7592, 102]])
        assert model(ids, torch.ones_like(ids), task_idx=1).shape == (1, 2)
        ```
    """

    def __init__(
        self, base_model_name: str | Path | PreTrainedModel, prompt_length: int, num_labels_list: Sequence[int]
    ) -> None:
        super().__init__()
        num_labels_list = list(num_labels_list)
        check_sizes(prompt_length=prompt_length, **{f"num_labels_list[{i}]": n for i, n in enumerate(num_labels_list)})
        if not num_labels_list:
            raise ValueError("num_labels_list must name at least one task; got none")
        self.base_model = _loaded(base_model_name)
        sizes = _sizes_of_encoder(self.base_model)
        self.num_layers = sizes.num_layers
        self.hidden_dim = sizes.hidden_size
        self.prompt_length = prompt_length
        self.prompt_encoder = DeepPromptEncoder(self.num_layers, self.hidden_dim, prompt_length, self.device)
        heads = nn.ModuleList(nn.Linear(sizes.output_size, num_labels) for num_labels in num_labels_list)
        self.classification_heads = heads.to(self.device)
        # In a tuple it is no child: its parameters are ours, under the tutorial's names.
        self._prompted = (_prompted(self.base_model, self.prompt_encoder),)

    @property
    def device(self) -> str:
        """Where the base computes; the tutorial's is set by whoever moves it, which changes nothing here."""
        return str(device_of(self.base_model))

    @device.setter
    def device(self, device: torch.device | str) -> None:
        torch.device(device)  # refuses what is none

    @property
    def backend(self) -> str:
        """Which backend of `ptv2_fast.attention.prompt_attention` runs; "auto" until it is set."""
        return self._prompted[0].ptv2_config["default"].backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self._prompted[0].ptv2_config["default"].backend = backend

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, task_idx: int = 0) -> Tensor:
        """The logits of whole rows, (B, num_labels), from their [CLS] tokens.

        Args:
            input_ids: (B, N) integers.
            attention_mask: (B, N), nonzero at real tokens; None means no padding.
            task_idx: which of the heads.

        Raises:
            ValueError: there is no such task, or a shape disagrees.
        """
        head = self._head(task_idx)
        mask = _as_mask(attention_mask, input_ids)
        read = tokens_read({"input_ids": input_ids, "attention_mask": mask}, "first")
        return _classified(head, pool(self._states(input_ids, mask, read), mask, "first"))

    def token_logits(self, input_ids: Tensor, attention_mask: Tensor | None, task_idx: int = 0) -> Tensor:
        """The logits of every token, (B, N, num_labels), as the tutorial's NER head gives them; arguments as `forward`.

        At padding they mean nothing.
        """
        head = self._head(task_idx)
        return _classified(head, self._states(input_ids, _as_mask(attention_mask, input_ids), None))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; prompts that run are the ones that are set.

        Raises:
            ValueError: it is the base, or the prompts are of other sizes.
        """
        if name in ("base_model", "prompt_encoder") and "_prompted" in self.__dict__:
            if name == "base_model":
                raise ValueError("base_model must stay what the model was made with: make another P_Tuning_Model")
            self._embedded.replace(value)
        super().__setattr__(name, value)

    def train(self: M, mode: bool = True) -> M:
        """Training or eval mode, of the base as well."""
        self._prompted[0].train(mode)
        return super().train(mode)

    @property
    def _embedded(self) -> _Embedded:
        return cast(_Embedded, self._prompted[0].adapters["default"].encoder)

    def _states(self, input_ids: Tensor, mask: Tensor | None, read: Tensor | None) -> Tensor:
        """(B, N, D) the base's last states; `read` are the tokens of the flattened (B, N) that the caller reads."""
        (model,) = self._prompted
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        return model.run(model.backbone, inputs, read=read).last_hidden_state

    def _head(self, task_idx: int) -> nn.Module:
        count = len(self.classification_heads)
        if task_idx not in range(-count, count):
            raise ValueError(f"task_idx must be in 0..{count - 1}; got {task_idx!r}")
        return self.classification_heads[task_idx]


class _Embedded(PromptEncoder):
    """Deep prompts of all layers that are the embeddings of a `DeepPromptEncoder`."""

    def __init__(self, embeddings: DeepPromptEncoder) -> None:
        nn.Module.__init__(self)
        self.source = embeddings
        self.injection, self.shape = "deep", _shape_of(embeddings)
        self.layers = tuple(range(self.shape[0]))
        self.gate = None

    def replace(self, embeddings: DeepPromptEncoder) -> None:
        """Be the embeddings of another encoder.

        Raises:
            ValueError: it is none, or has other sizes.
        """
        if not isinstance(embeddings, DeepPromptEncoder) or _shape_of(embeddings) != self.shape:
            found = _shape_of(embeddings) if isinstance(embeddings, DeepPromptEncoder) else type(embeddings).__name__
            raise ValueError(f"prompt_encoder must be a DeepPromptEncoder of sizes {self.shape}; got {found}")
        self.source = embeddings

    def forward(self) -> Tensor:
        """(L, P, D)."""
        return torch.stack([self.source(layer) for layer in self.layers])


def _shape_of(embeddings: DeepPromptEncoder) -> tuple[int, ...]:
    """(L, P, D)."""
    return (len(embeddings.prompts), *embeddings.prompts[0].weight.shape)


def _prompted(base: PreTrainedModel, embeddings: DeepPromptEncoder) -> PTuningV2Model:
    """The base, frozen, with those prompts."""
    config = PTuningV2Config("FEATURE_EXTRACTION", embeddings.prompt_length, injection="deep")
    with torch.device("meta"):
        adapter = Adapter(base, config, device="meta")
    adapter.encoder = _Embedded(embeddings)
    return PTuningV2Model(base, config, adapter=adapter)


def _loaded(base: str | Path | PreTrainedModel) -> PreTrainedModel:
    if isinstance(base, (str, Path)):
        return AutoModel.from_pretrained(base).to("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"base_model_name must be a name, a folder or a model; got {type(base).__name__}")
    return base


def _sizes_of_encoder(base: PreTrainedModel) -> Dimensions:
    """The sizes of the base's backbone.

    Raises:
        ValueError: it has a decoder, is one, or reads no text.
    """
    backbone = backbone_of(base)
    family = family_of(backbone)
    sizes = family.sizes(backbone)
    if family.causal or sizes.decoder_layers or not reads_text(family):
        raise ValueError(
            "base_model_name must be an encoder of texts, whose first token stands for a row (get_ptv2_model takes "
            f"others); got {type(base).__name__}"
        )
    return sizes


def _as_mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """(B, N) bool, of whatever kind of numbers the mask is: the tutorial has floating-point ones."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (B, N); got {tuple(input_ids.shape)}")
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}; "
            f"got {tuple(attention_mask.shape)}"
        )
    return attention_mask != 0


def _classified(head: nn.Module, states: Tensor) -> Tensor:
    """A head's logits; it may be wider than the base, and any module."""
    return head(states.to(next((p.dtype for p in head.parameters() if p.is_floating_point()), states.dtype)))
