"""The load on the example's server: what it takes for right."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import pytest

from benchmarks.host.serve_load import BEGUN, READ, Load, near, quantiles, told_apart

TEXTS = {(name, text, False): (f"{name} {text}", 0.5) for name in ("base", "chat", "other") for text in BEGUN}
CLASSES = {"ham": 0.25, "spam": 0.75}


def answered(text: str):
    """OpenAI's client, which gets this text."""

    async def create(**given):
        return SimpleNamespace(choices=[SimpleNamespace(text=text.format(**given), finish_reason="length")])

    return SimpleNamespace(completions=SimpleNamespace(create=create))


def judged(text: str, texts: dict = TEXTS, versions: tuple[str, ...] = ("chat",), name: str = "chat") -> str:
    load = Load(SimpleNamespace(hang_up=0.0), "http://nowhere", texts, {})
    load.openai, load.versions = answered(text), list(versions)

    class Draw(random.Random):
        def choice(self, values):
            return name if name in values else values[0]

    return asyncio.run(load.generates("completion", Draw(0)))


def test_an_answer_is_right_that_its_own_adapter_gives():
    assert judged("chat {prompt}") == "right"
    assert judged("base {prompt}", name="base") == "right"
    assert judged("base {prompt}") == "wrong", "another adapter's answer"
    assert judged("other {prompt}") == "wrong", "a version that is not served any more"
    assert judged("other {prompt}", versions=("chat", "other")) == "right"
    near_by = {key: (text, 1e-4) for key, (text, _) in TEXTS.items()}
    assert judged("neither", near_by) == "right up to a tie"


@pytest.mark.parametrize("spam, how", [(0.75, "right"), (0.7504, "right"), (0.77, "wrong")])
def test_scores_may_differ_in_their_last_digits(spam, how):
    load = Load(SimpleNamespace(hang_up=0.0), "http://nowhere", {}, {("spam", text): CLASSES for text in READ})

    async def post(route, json):
        texts = json["input"] if isinstance(json["input"], list) else [json["input"]]
        data = [{"scores": {"ham": 0.25, "spam": spam}} for _ in texts]
        answer = SimpleNamespace(json=lambda: {"data": data})
        answer.raise_for_status = lambda: answer
        return answer

    load.http = SimpleNamespace(post=post)
    assert asyncio.run(load.reads("classify", random.Random(1))) == how


def test_entities_must_be_the_same_in_everything_else():
    one = {"start": 0, "end": 3, "label": "PER", "text": "Ada", "score": 0.9}
    assert near([one], [{**one, "score": 0.90001}])
    assert not near([one], []) and not near([one], [{**one, "label": "LOC"}]) and not near([one], [{**one, "end": 4}])


def test_quantiles_and_texts_that_tell_adapters_apart():
    assert quantiles([float(second) for second in range(1, 100)]) == {"n": 99, "p50": 50.0, "p95": 95.0}
    same = {**TEXTS, ("other", BEGUN[0], False): TEXTS["chat", BEGUN[0], False]}
    assert told_apart(same, "chat", "other") == len(BEGUN) - 1
