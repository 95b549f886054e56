"""The model families that are served: by the package itself, and by whoever registers one."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from ptv2_fast.families.albert import Albert
from ptv2_fast.families.bart import Bart
from ptv2_fast.families.bert import Bert
from ptv2_fast.families.clip import ClipText, ClipVision
from ptv2_fast.families.cohere import Cohere, Cohere2
from ptv2_fast.families.deberta import Deberta
from ptv2_fast.families.dimensions import Dimensions
from ptv2_fast.families.dinov2 import Dinov2
from ptv2_fast.families.distilbert import DistilBert
from ptv2_fast.families.family import READS, Family
from ptv2_fast.families.gemma import Gemma2, Gemma3
from ptv2_fast.families.glm import Glm
from ptv2_fast.families.gpt2 import Gpt2
from ptv2_fast.families.gpt_neox import GptNeox
from ptv2_fast.families.gptj import GptJ
from ptv2_fast.families.llama import Llama
from ptv2_fast.families.mbart import MBart
from ptv2_fast.families.modernbert import ModernBert
from ptv2_fast.families.modernbert_decoder import ModernBertDecoder
from ptv2_fast.families.mpnet import Mpnet
from ptv2_fast.families.olmo2 import Olmo2
from ptv2_fast.families.opt import Opt
from ptv2_fast.families.phi3 import Phi3
from ptv2_fast.families.recognise import recognise, why_not_tried, why_unlike
from ptv2_fast.families.refused import REFUSED
from ptv2_fast.families.roberta import Roberta
from ptv2_fast.families.t5 import T5
from ptv2_fast.families.vit import Vit
from ptv2_fast.families.whisper import Whisper

# `config.model_type` -> its family: the package's own. An unlisted model is compared with one after the other.
OWN: Mapping[str, Family] = MappingProxyType(
    {
        "bert": Bert(),
        "roberta": Roberta(),
        "xlm-roberta": Roberta(),
        "electra": Bert(),
        "albert": Albert(),
        "deberta-v2": Deberta(),
        "distilbert": DistilBert(),
        "modernbert": ModernBert(),
        "mpnet": Mpnet(),
        "gpt2": Gpt2(),
        "opt": Opt(),
        "gpt_neox": GptNeox(),
        "gptj": GptJ(),
        "llama": Llama(),
        "mistral": Llama(),
        "mixtral": Llama(),
        "qwen2": Llama(),
        "qwen3": Llama(),
        "qwen3_moe": Llama(),
        "smollm3": Llama(),
        "olmo2": Olmo2(),
        "glm": Glm(),
        "glm4": Glm(),
        "cohere": Cohere(),
        "cohere2": Cohere2(),
        "phi3": Phi3(),
        "gemma2": Gemma2(),
        "gemma3_text": Gemma3(),
        "modernbert-decoder": ModernBertDecoder(),
        "vit": Vit(),
        "dinov2": Dinov2(),
        "dinov2_with_registers": Dinov2(),
        "clip_vision_model": ClipVision(),
        "clip_text_model": ClipText(),
        "whisper": Whisper(),
        "t5": T5(),
        "mt5": T5(),
        "bart": Bart(),
        "mbart": MBart(),
    }
)

# Replaced as a whole, so that who reads it needs no lock.
_registered: dict[str, Family] = {}
_registering = threading.Lock()
# Backbones that are of a registered family, and stay so when it is taken back.
_served: WeakKeyDictionary[PreTrainedModel, Family] = WeakKeyDictionary()


def register_family(model_type: str, family: Family) -> None:
    """Serve a model type that the package does not know, as it serves its own.

    From here on a base whose `config.model_type` is this one is of this family, in this process: a program registers
    it before it wraps or loads such a model, in every process that does. Nothing is tried on the model: the family
    answers for it. A causal language model of a family's is what `linear_head` says, and the family's own sequence
    classifier reads what `reads_first` says.

    Args:
        model_type: what the configurations of such models say.
        family: an instance of a subclass of `Family`, or of one of the package's own families where a model is like it.

    Raises:
        ValueError: the model type is no name, or another family has it; or the family is none, or reads what no call
            brings.

    Example:
        ```python
        from ptv2_fast import register_family
        from ptv2_fast.families.llama import Llama

        class MyModel(Llama):
            attention_path, key_path, value_path = "attention", "wk", "wv"

        register_family("my_model", MyModel())
        ```
    """
    global _registered
    if not isinstance(model_type, str) or not model_type.strip():
        raise ValueError(f"model_type must be a model's config.model_type, a name; got {model_type!r}")
    if not isinstance(family, Family):
        hint = ", a class; make an instance of it" if isinstance(family, type) and issubclass(family, Family) else ""
        raise ValueError(f"family must be an instance of a subclass of Family; got {family!r}{hint}")
    if family.reads not in READS:
        raise ValueError(f"{family!r}.reads must be one of {', '.join(READS)}; got {family.reads!r}")
    with _registering:
        taken = _listed(model_type)
        if taken is not None and taken != family:
            again = "; unregister_family takes that back" if model_type in _registered else ""
            raise ValueError(
                f"model_type must have no family yet, but {model_type!r} is {taken!r}; got {family!r}{again}"
            )
        if taken is None:
            _registered = {**_registered, model_type: family}


def unregister_family(model_type: str) -> None:
    """Take back what `register_family` did; models that are wrapped keep their family, copies of them apart.

    Args:
        model_type: what was registered.

    Raises:
        ValueError: nobody registered that model type.

    Example:
        ```python
        from ptv2_fast import register_family
        from ptv2_fast.families.llama import Llama
        from ptv2_fast.families.registry import families, unregister_family

        register_family("my_model", Llama())
        unregister_family("my_model")
        assert "my_model" not in families()
        ```
    """
    global _registered
    with _registering:
        if not isinstance(model_type, str) or model_type not in _registered:
            registered = ", ".join(sorted(_registered)) or "none"
            raise ValueError(f"model_type must be one that was registered ({registered}); got {model_type!r}")
        _registered = {name: family for name, family in _registered.items() if name != model_type}


def families() -> dict[str, Family]:
    """Every family by its model type: the package's own, then those that were registered."""
    return {**OWN, **_registered}


def family_of(backbone: PreTrainedModel) -> Family:
    """The family of a backbone: by its `config.model_type`, or the listed one that it behaves like.

    Args:
        backbone: a model without a head, as AutoModel makes it; a model with one has it as its `base_model`.

    Raises:
        ValueError: its model type is not listed and it behaves like none that is, or its family refuses it; the message
            lists the known ones.

    Example:
        ```python
        from transformers import BertConfig, BertModel

        from ptv2_fast.families.registry import family_of

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        assert family_of(base).attention_path == "attention.self"
        ```
    """
    model_type: Any = getattr(backbone.config, "model_type", None)
    family, name = listed_family(backbone), type(backbone).__name__
    if family is None and model_type == "clip":
        raise ValueError(f"base must be one tower: wrap the vision_model or the text_model of {name}")
    if family is None:
        family = recognise(backbone, families())
    if family is None and model_type in REFUSED:
        raise ValueError(f"base must be of a family that can be served: {REFUSED[model_type]}; got {name}")
    if family is None:
        untried = why_not_tried(backbone)
        tried = f"; it was not tried: {untried}" if untried else ", or make its keys and values as one of them does"
        if untried is None and (unlike := why_unlike(backbone)) is not None:
            tried += f", but {unlike}"
        served = ", ".join(sorted(families()))
        raise ValueError(
            f"base must be of a supported family ({served}){tried}; got {name} with model_type {model_type!r}"
        )
    if not family.causal and _decodes_alone(backbone):
        raise ValueError(f"base must be an encoder; got {name} configured with is_decoder=True")
    family.check(backbone)
    return family


def _decodes_alone(backbone: PreTrainedModel) -> bool:
    """Whether a stack by itself is configured as a decoder; one beside a decoder is an encoder whatever its
    configuration says, and so is one whose own configuration says so (T5's)."""
    if hasattr(backbone, "decoder"):
        return False
    own = getattr(getattr(backbone, "encoder", backbone), "config", backbone.config)
    return bool(getattr(own, "is_decoder", False))


def sizes_of(backbone: PreTrainedModel) -> Dimensions:
    """The sizes of a backbone, as its family reads them."""
    return family_of(backbone).sizes(backbone)


def is_listed(backbone: PreTrainedModel) -> bool:
    """Whether the family is known by name, and with it what its task heads do."""
    return listed_family(backbone) is not None


def listed_family(backbone: PreTrainedModel) -> Family | None:
    """The family of a backbone that is known by name; None where it is not."""
    model_type = getattr(backbone.config, "model_type", None)
    family = _listed(model_type)
    if family is None:
        return _served.get(backbone)
    if model_type not in OWN:
        _served[backbone] = family
    return family


def _listed(model_type: Any) -> Family | None:
    return OWN.get(model_type) or _registered.get(model_type)
