"""P-Tuning v2: deep prompt tuning of frozen transformers at the price of the frozen model."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "Buckets",
    "GraphRunner",
    "HeadConfig",
    "PTuningV2Config",
    "PTuningV2Model",
    "PTuningV2ModelForAudioClassification",
    "PTuningV2ModelForCausalLM",
    "PTuningV2ModelForFeatureExtraction",
    "PTuningV2ModelForImageClassification",
    "PTuningV2ModelForMultipleChoice",
    "PTuningV2ModelForQuestionAnswering",
    "PTuningV2ModelForSeq2SeqLM",
    "PTuningV2ModelForSentenceRetrieval",
    "PTuningV2ModelForSequenceClassification",
    "PTuningV2ModelForTokenClassification",
    "StepOptions",
    "from_paper",
    "from_peft",
    "get_ptv2_model",
    "prompt_attention",
    "register_family",
]

# Loaded when asked for, so that the command line's help need not wait for torch and transformers.
_HOME = {
    "Buckets": "ptv2_fast.step.packed",
    "GraphRunner": "ptv2_fast.step.graph_runner",
    "HeadConfig": "ptv2_fast.config",
    "PTuningV2Config": "ptv2_fast.config",
    "PTuningV2Model": "ptv2_fast.model",
    "PTuningV2ModelForAudioClassification": "ptv2_fast.task_models.classes",
    "PTuningV2ModelForCausalLM": "ptv2_fast.task_models.causal_lm",
    "PTuningV2ModelForFeatureExtraction": "ptv2_fast.task_models.classes",
    "PTuningV2ModelForImageClassification": "ptv2_fast.task_models.classes",
    "PTuningV2ModelForMultipleChoice": "ptv2_fast.task_models.classes",
    "PTuningV2ModelForQuestionAnswering": "ptv2_fast.task_models.classes",
    "PTuningV2ModelForSeq2SeqLM": "ptv2_fast.task_models.seq2seq",
    "PTuningV2ModelForSentenceRetrieval": "ptv2_fast.task_models.retrieval",
    "PTuningV2ModelForSequenceClassification": "ptv2_fast.task_models.classes",
    "PTuningV2ModelForTokenClassification": "ptv2_fast.task_models.classes",
    "StepOptions": "ptv2_fast.step.options",
    "from_paper": "ptv2_fast.interop.paper",
    "from_peft": "ptv2_fast.interop.peft_import",
    "get_ptv2_model": "ptv2_fast.task_models.classes",
    "prompt_attention": "ptv2_fast.attention.api",
    "register_family": "ptv2_fast.families.registry",
}

if TYPE_CHECKING:
    from ptv2_fast.attention.api import prompt_attention
    from ptv2_fast.config import HeadConfig, PTuningV2Config
    from ptv2_fast.families.registry import register_family
    from ptv2_fast.interop.paper import from_paper
    from ptv2_fast.interop.peft_import import from_peft
    from ptv2_fast.model import PTuningV2Model
    from ptv2_fast.step.graph_runner import GraphRunner
    from ptv2_fast.step.options import StepOptions
    from ptv2_fast.step.packed import Buckets
    from ptv2_fast.task_models.causal_lm import PTuningV2ModelForCausalLM
    from ptv2_fast.task_models.classes import (
        PTuningV2ModelForAudioClassification,
        PTuningV2ModelForFeatureExtraction,
        PTuningV2ModelForImageClassification,
        PTuningV2ModelForMultipleChoice,
        PTuningV2ModelForQuestionAnswering,
        PTuningV2ModelForSequenceClassification,
        PTuningV2ModelForTokenClassification,
        get_ptv2_model,
    )
    from ptv2_fast.task_models.retrieval import PTuningV2ModelForSentenceRetrieval
    from ptv2_fast.task_models.seq2seq import PTuningV2ModelForSeq2SeqLM
else:
    # Unknown to type checkers, to which every other name of the module would be Any.
    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
