"""Recipes: how the released P-Tuning v2 results were trained, as data.

In all of them the base is frozen and AdamW runs without weight decay at a gradient norm of at most
1.0; the best epoch on the development set is reported.

Source: P-Tuning v2 (Liu et al., 2022) and the training scripts and results released with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One training run: what to train, how, and what the released run reached.

    Attributes:
        name: task and base, such as "rte-bert-large".
        base: the model on the hub (cased or not, as the released script has it).
        task_type: SEQ_CLS, TOKEN_CLS, QUESTION_ANS or MULTIPLE_CHOICE.
        num_virtual_tokens: P, prompt rows in every layer.
        learning_rate: of AdamW, at the start.
        epochs: passes over the training set.
        batch_size: rows of a step.
        metric: what the result is measured by.
        result: the released result, in percent.
        max_length: tokens of a row, without the prompt; rows are padded to it.
        dropout: of the base's hidden states (0.1 unless the released script says otherwise).
        reparameterization_hidden_size: width of the prompt's MLP; None: no MLP.
        lr_schedule: "linear" (down to zero) or "exponential" (times lr_decay each epoch).
        lr_decay: factor an epoch of the exponential schedule.
        doc_stride: tokens that neighbouring windows of a context share; None outside QA.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to it.
        note: where the released run differs in kind; empty otherwise.
    """

    name: str
    base: str
    task_type: str
    num_virtual_tokens: int
    learning_rate: float
    epochs: int
    batch_size: int
    metric: str
    result: str
    max_length: int = 128
    dropout: float = 0.1
    reparameterization_hidden_size: int | None = None
    lr_schedule: str = "linear"
    lr_decay: float = 0.95
    doc_stride: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    note: str = ""


_CASED, _UNCASED = "google-bert/bert-large-cased", "google-bert/bert-large-uncased"
_ROBERTA = "FacebookAI/roberta-large"
_DECAYED = {"lr_schedule": "exponential"}
_TAGS = {"task_type": "TOKEN_CLS", "metric": "f1", **_DECAYED}
_ANSWERS = {"task_type": "QUESTION_ANS", "metric": "f1", "max_length": 384, "doc_stride": 128}
_CHOICE = {"task_type": "MULTIPLE_CHOICE"}
_WSC = "the text is preceded by the pronoun in question and a colon"
_WIC_BERT = "each sentence is preceded by the word in question and a colon"
_WIC_ROBERTA = "one text: both sentences and a question whether the word means the same in both"
_CONLL12_BERT = "the result is BERT-large's; the released script of this name trains RoBERTa-large"


def _recipe(
    name: str,
    base: str,
    num_virtual_tokens: int,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    result: str,
    **others: Any,
) -> Recipe:
    settings = {"task_type": "SEQ_CLS", "metric": "accuracy", **others}
    return Recipe(
        name=name,
        base=base,
        num_virtual_tokens=num_virtual_tokens,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        result=result,
        **settings,
    )


# Each row: name, base, P, learning rate, epochs, batch size, released result, what differs.
_ALL = (
    _recipe("boolq-bert-large", _CASED, 40, 5e-3, 100, 32, "74.3 accuracy"),
    _recipe("boolq-roberta-large", _ROBERTA, 8, 7e-3, 100, 32, "84.0 accuracy"),
    _recipe("copa-bert-large", _CASED, 16, 1e-2, 80, 16, "77.0 accuracy", **_CHOICE),
    _recipe("copa-roberta-large", _ROBERTA, 8, 9e-3, 120, 16, "92.0 accuracy", **_CHOICE),
    _recipe("rte-bert-large", _CASED, 20, 1e-2, 60, 32, "80.1 accuracy"),
    _recipe("rte-roberta-large", _ROBERTA, 128, 5e-3, 100, 32, "86.6 accuracy"),
    _recipe(
        "wic-bert-large",
        _CASED,
        20,
        1e-4,
        80,
        16,
        "75.1 accuracy",
        reparameterization_hidden_size=512,
        note=_WIC_BERT,
    ),
    _recipe("wic-roberta-large", _ROBERTA, 8, 1e-2, 50, 32, "73.7 accuracy", note=_WIC_ROBERTA),
    _recipe("wsc-bert-large", _CASED, 20, 5e-3, 80, 16, "68.3 accuracy", note=_WSC),
    _recipe("wsc-roberta-large", _ROBERTA, 8, 1e-2, 10, 16, "64.4 accuracy", note=_WSC),
    _recipe(
        "conll03-roberta-large",
        _ROBERTA,
        11,
        3e-2,
        30,
        16,
        "91.8 entity F1",
        max_length=152,
        **_TAGS,
    ),
    _recipe("conll04-bert-large", _UNCASED, 128, 2e-2, 40, 32, "84.5 entity F1", dropout=0.2, **_TAGS),
    _recipe("conll04-roberta-large", _ROBERTA, 144, 6e-2, 80, 32, "88.4 entity F1", **_TAGS),
    _recipe("ontonotes-bert-large", _UNCASED, 16, 1e-2, 30, 16, "86.4 entity F1", **_TAGS),
    _recipe("ontonotes-roberta-large", _ROBERTA, 48, 7e-3, 60, 16, "90.1 entity F1", **_TAGS),
    _recipe(
        "conll05-roberta-large",
        _ROBERTA,
        224,
        6e-3,
        15,
        16,
        "89.4 F1 (WSJ), 83.9 F1 (Brown)",
        **_TAGS,
    ),
    _recipe("conll12-bert-large", _UNCASED, 128, 5e-3, 45, 16, "85.3 F1", note=_CONLL12_BERT, **_TAGS),
    _recipe("conll12-roberta-large", _ROBERTA, 64, 5e-3, 45, 32, "84.7 F1", **_TAGS),
    _recipe(
        "squad1-roberta-large",
        _ROBERTA,
        16,
        5e-3,
        30,
        8,
        "88.1 exact match, 94.2 F1",
        dropout=0.2,
        **_ANSWERS,
        **_DECAYED,
    ),
    _recipe(
        "squad2-roberta-large",
        _ROBERTA,
        8,
        5e-3,
        10,
        8,
        "81.3 exact match, 84.7 F1",
        dropout=0.2,
        **_ANSWERS,
        **_DECAYED,
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _ALL})


def get_recipe(name: str) -> Recipe:
    """The recipe of that name, such as "rte-bert-large".

    Raises:
        ValueError: there is none; the message lists the names.

    Example:
        ```python
        from ptv2_fast.training.recipes import get_recipe

        recipe = get_recipe("rte-bert-large")
        assert recipe.num_virtual_tokens == 20 and recipe.learning_rate == 1e-2
        ```
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: must be one of {', '.join(sorted(RECIPES))}; got {name!r}")
    return RECIPES[name]
