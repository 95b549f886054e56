"""mBART's decoder starts at the token that ends each row's labels, its language, or at a language that is asked for."""

from __future__ import annotations

import pytest
import torch

from batches import padded
from tiny_models import INJECTIONS
from tiny_seq2seq import STACKS, START, Pair, literal, literal_logits, rows, tiny_base, tiny_model
from tolerances import assert_equal

LANGUAGES = (35, 36, 37)


def _model(injection, **config):
    return tiny_model("mbart", injection, stacks=None if injection == "shallow" else STACKS, **config)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_each_rows_decoder_starts_with_the_last_of_its_labels(injection):
    """The loss and its gradients are those of the literal form, which reads the labels behind their language."""
    model, base = _model(injection, exact=True), tiny_base("mbart", exact=True)
    targets = [torch.cat([target, torch.tensor([code])]) for (_, target), code in zip(rows(), LANGUAGES, strict=True)]
    batch = Pair(padded([text for text, _ in rows()], "left"), padded(targets, "right"))
    read = padded([target.roll(1) for target in targets], "right")
    assert read.input_ids[:, 0].tolist() == list(LANGUAGES)
    states, _ = literal(model, base.model, *batch.source.inputs.values(), *read.inputs.values())
    logits = literal_logits(base, states)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    loss = model(**batch.source.inputs, labels=batch.labels).loss
    assert_equal(loss, expected, "loss")
    prompts = model.adapters["default"].encoder.prompts
    assert_equal(*(torch.autograd.grad(one, prompts)[0] for one in (loss, expected)), "gradient")


@pytest.mark.parametrize("injection", INJECTIONS)
def test_a_language_that_is_asked_for_is_the_first_token(injection):
    """As mBART-50 has it; what follows is the literal form's."""
    model, base = _model(injection), tiny_base("mbart")
    texts = [text for text, _ in rows()]
    batch = padded(texts, "left")
    found = model.generate(**batch.inputs, forced_bos_token_id=LANGUAGES[1], max_new_tokens=5, do_sample=False)
    for row, text in zip(found, texts, strict=True):
        ids = torch.tensor([[START, LANGUAGES[1]]])
        for _ in range(4):
            states, _ = literal(model, base.model, text[None], None, ids)
            ids = torch.cat([ids, literal_logits(base, states[:, -1:]).argmax(-1)], -1)
        assert torch.equal(row, ids[0])


@pytest.mark.parametrize("injection", INJECTIONS)
def test_each_row_may_start_at_its_own_language(injection):
    model = _model(injection)
    texts = [text for text, _ in rows()]
    begin = torch.tensor([[START, code] for code in LANGUAGES])
    options = {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(**padded(texts, "left").inputs, decoder_input_ids=begin, **options)
    assert torch.equal(found[:, :2], begin)
    for row, text, first in zip(found, texts, begin, strict=True):
        assert torch.equal(row, model.generate(text[None], decoder_input_ids=first[None], **options)[0])
