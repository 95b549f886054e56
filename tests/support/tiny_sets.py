"""Folders with adapters of several tasks over one tiny base, with prompts that change what the base says."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, get_ptv2_model

CLASSES, TAGS, TOPICS = ("negative", "positive"), ("O", "B-PER", "B-LOC"), ("film", "river", "bank")


def _head(task: str, labels: tuple[str, ...], **options: object) -> PTuningV2Config:
    head = HeadConfig(task, len(labels), labels=labels, **options)
    return PTuningV2Config(task, num_virtual_tokens=3, heads={"own": head})


CONFIGS = {
    "chat": PTuningV2Config("CAUSAL_LM", num_virtual_tokens=4),
    "poet": PTuningV2Config("CAUSAL_LM", injection="prefix", num_virtual_tokens=2),
    "ner": _head("TOKEN_CLS", TAGS),
    "spam": _head("SEQ_CLS", CLASSES),
    "topics": _head("SEQ_CLS", TOPICS, problem_type="multi_label_classification"),
    "mood": PTuningV2Config(
        "SEQ_CLS", num_virtual_tokens=3, heads={"own": HeadConfig("SEQ_CLS", 1, problem_type="regression")}
    ),
    "qa": PTuningV2Config("QUESTION_ANS", num_virtual_tokens=3, heads={"own": 2}),
    "choice": PTuningV2Config("MULTIPLE_CHOICE", num_virtual_tokens=3, heads={"own": 1}),
    "find": PTuningV2Config("SENTENCE_RETRIEVAL", num_virtual_tokens=3),
}


def several(base: transformers.PreTrainedModel, names: tuple[str, ...], **configs: PTuningV2Config) -> PTuningV2Model:
    """A model with these of `CONFIGS` and others, all drawn anew and wide, so that each says something else."""
    torch.manual_seed(3)
    wanted = {**{name: CONFIGS[name] for name in names}, **configs}
    (first, config), *others = wanted.items()
    model = get_ptv2_model(base, config, first)
    for name, config in others:
        model.add_adapter(name, config)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(std=0.7)
    return model.eval()


def saved_set(folder: Path, base: Path, names: tuple[str, ...], **configs: PTuningV2Config) -> Path:
    """A folder with such adapters over the base of another folder."""
    kinds = {**CONFIGS, **configs}
    writes = any(kinds[name].task_type == "CAUSAL_LM" for name in (*names, *configs))
    loader = transformers.AutoModelForCausalLM if writes else transformers.AutoModel
    several(loader.from_pretrained(base), names, **configs).save_pretrained(folder)
    return folder
