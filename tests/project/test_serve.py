"""examples/serve.py over real sockets, asked by OpenAI's own client: answers are those of the model alone."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from processes import free_port, started
from ptv2_fast import PTuningV2Model
from ptv2_fast.task_models.continuous_batching import SERVED
from served_adapters import (
    CLASSES,
    LONG,
    SCRIPT,
    TAGS,
    answers,
    endless,
    generated,
    httpx,
    messages,
    running,
    script,
    until,
    write_adapters,
)
from tiny_folders import llama_folder, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.skipif(not SERVED, reason="this transformers' pages cannot be read beside prompts")

TEXT = "Anna met Lee in Oslo, the film was good."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve")) as found:
        yield found


@pytest.fixture
def changed(tmp_path):
    """A server of its own, whose folder a test changes."""
    with running(tmp_path) as found:
        yield found


def test_the_base_and_every_adapter_are_listed(server):
    listed = {model.id: model.task for model in server.openai.models.list()}
    assert listed == {
        "base": "CAUSAL_LM", "chat": "CAUSAL_LM", "letters": "CAUSAL_LM", "ner": "TOKEN_CLS", "spam": "SEQ_CLS",
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_requests_of_all_adapters_at_once_get_the_text_of_the_model_alone(server, stream):
    cases = [
        (name, text, most, chat)
        for chat in (False, True)
        for name in ("base", "chat", "letters")
        for text, most in (("anna met", 7), ("the film was very good in", 1), ("where is bob", 12), ("of", 24))
    ]

    async def together():
        async with server.client() as client:
            return await asyncio.gather(*(answers(client, *case, stream) for case in cases))

    found = asyncio.run(together())
    expected = [generated(server.alone, name, f"{text} ?" if chat else text, n) for name, text, n, chat in cases]
    assert found == expected
    assert len(set(found)) > len(cases) // 2, "adapters change too little: the test could not fail"


def test_texts_are_classified_as_by_the_model_alone(server):
    texts = [TEXT, "the film", "bob saw a poor river"]
    answer = server.http.post("/v1/classify", json={"model": "spam", "input": texts}).json()
    assert [set(one["scores"]) for one in answer["data"]] == [set(CLASSES)] * 3
    for text, one in zip(texts, answer["data"], strict=True):
        ids = tiny_tokenizer(causal=True)(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = server.alone(input_ids=ids, adapter_names=["spam"]).logits[0].softmax(-1)
        assert list(one["scores"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert one["label"] == CLASSES[int(expected.argmax())] and one["score"] == one["scores"][one["label"]]
    single = server.http.post("/v1/classify", json={"model": "spam", "input": texts[1]}).json()
    assert single["data"][0]["scores"] == pytest.approx(answer["data"][1]["scores"], abs=1e-5)


def test_texts_are_tagged_as_by_the_model_alone_with_the_places_of_their_words(server):
    texts = [TEXT, "  bob  saw\nparis", "the"]
    answer = server.http.post("/v1/tag", json={"model": "ner", "input": texts}).json()
    assert any(one["entities"] for one in answer["data"])
    for text, one in zip(texts, answer["data"], strict=True):
        encoded = tiny_tokenizer(causal=True)(text, return_tensors="pt", return_offsets_mapping=True)
        with torch.no_grad():
            logits = server.alone(input_ids=encoded["input_ids"], adapter_names=["ner"]).logits[0]
        kinds = [TAGS[tag].rpartition("-")[2] for tag in logits.argmax(-1)]
        # A token of this tokenizer is a word.
        words = dict(zip(map(tuple, encoded["offset_mapping"][0].tolist()), kinds, strict=True))
        tagged = {(start, end): kind for (start, end), kind in words.items() if kind != "O"}
        for entity in one["entities"]:
            assert entity["text"] == text[entity["start"] : entity["end"]] and 0 < entity["score"] <= 1
            inside = [at for at in tagged if entity["start"] <= at[0] and at[1] <= entity["end"]]
            assert inside and {tagged.pop(at) for at in inside} == {entity["label"]}
        assert not tagged


def test_entities_join_words_that_go_on_and_part_at_a_beginning():
    words = "New York and Ada Lovelace Bob O'Neil".split()
    tags = ["B-LOC", "I-LOC", "O", "B-PER", "I-PER", "B-PER", "I-PER"]
    text, labels = " ".join(words), ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    # Each word in two pieces, of which the second one has another tag.
    offsets, rows = [(0, 0)], [0]
    for match, tag in zip(re.finditer(r"\S+", text), tags, strict=True):
        offsets += [(match.start(), match.start() + 1), (match.start() + 1, match.end())]
        rows += [labels.index(tag), 0]
    job = type("Job", (), {})()
    job.text, job.served, job.encoded = text, type("Served", (), {"labels": labels}), type("Encoded", (), {})
    job.encoded.offset_mapping = offsets
    found = script().entities(job, 9.0 * torch.nn.functional.one_hot(torch.tensor(rows), 5))
    assert [(one["text"], one["label"]) for one in found] == [
        ("New York", "LOC"), ("Ada Lovelace", "PER"), ("Bob O'Neil", "PER"),
    ]  # fmt: skip


def test_a_stop_ends_the_text_before_it(server):
    whole, _, _ = generated(server.alone, "letters", "anna met", 24)
    words = whole.split()
    stop = f"{words[2]} {words[3]}"  # of two tokens: the first one waits for the second
    before = whole[: whole.index(stop)]
    given = {"model": "letters", "prompt": "anna met", "max_tokens": 24}
    answer = server.openai.completions.create(**given, stop=[stop, "never there"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (before, "stop")
    parts = list(server.openai.completions.create(**given, stop=stop, stream=True))
    assert "".join(part.choices[0].text for part in parts) == before
    assert parts[-1].choices[0].finish_reason == "stop"
    until(lambda: server.active() == 0)


def test_what_nobody_expected_is_said_in_openais_form(server, monkeypatch):
    monkeypatch.setattr(server.engine, "submit", None)
    with httpx.Client(base_url=server.url) as client:
        answer = client.post("/v1/completions", json=GOOD)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert server.active() == 0


def test_a_stream_is_events_in_openais_form(server):
    body = {"model": "chat", "messages": messages("anna"), "max_tokens": 3, "stream": True}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]" and all(event.startswith("data: {") for event in events[:-1])
    assert '"usage"' not in answer.text and '"object": "chat.completion.chunk"' in events[0]


GOOD = {"model": "chat", "prompt": "anna", "max_tokens": 2}
REFUSED = {
    "an unknown model": ("/v1/completions", GOOD | {"model": "nobody"}, 404, "chat, letters"),
    "an unknown route": ("/v1/embeddings", {}, 404, "Not Found"),
    "another task's route": ("/v1/completions", GOOD | {"model": "ner"}, 400, "/v1/tag"),
    "another task's adapter": ("/v1/tag", {"model": "chat", "input": "anna"}, 400, "/v1/completions"),
    "a long prompt": ("/v1/completions", GOOD | {"prompt": "anna " * 41}, 400, "1 to 40 tokens"),
    "a prompt that nobody splits": ("/v1/completions", GOOD | {"prompt": "a" * 5000}, 400, "1 to 40 tokens"),
    "no prompt": ("/v1/completions", GOOD | {"prompt": ""}, 400, "1 to 40 tokens"),
    "no input": ("/v1/classify", {"model": "spam", "input": []}, 400, "input"),
    "many tokens": ("/v1/completions", GOOD | {"max_tokens": LONG + 1}, 400, f"at most {LONG}"),
    "no tokens": ("/v1/completions", GOOD | {"max_tokens": 0}, 400, "max_tokens"),
    "a temperature": ("/v1/completions", GOOD | {"temperature": 0.7}, 400, "greedy"),
    "several answers": ("/v1/completions", GOOD | {"n": 2}, 400, "n:"),
    "what is not served": ("/v1/completions", GOOD | {"logit_bias": {}}, 400, "logit_bias"),
    "no conversation": ("/v1/chat/completions", {"model": "chat", "messages": []}, 400, "messages"),
    "no content": (
        "/v1/chat/completions",
        {"model": "chat", "messages": [{"role": "user"}]},
        400,
        "messages.0.content",
    ),
    "half a character": ("/v1/completions", GOOD | {"prompt": "\ud800"}, 400, "Unicode"),
    "no JSON": ("/v1/completions", None, 400, "JSON"),
}


@pytest.mark.parametrize("route, body, status, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_said_in_openais_form(server, route, body, status, message):
    before = server.metric(f'ptv2_refused_total{{status="{status}"}}')
    content = "{" if body is None else json.dumps(body)
    answer = server.http.post(route, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert set(answer.json()) == {"error"} and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert message in answer.json()["error"]["message"]
    assert server.metric(f'ptv2_refused_total{{status="{status}"}}') == before + 1
    assert server.active() == 0


def test_openais_client_raises_its_own_errors(server):
    import openai

    with pytest.raises(openai.NotFoundError, match="must be one of base"):
        server.openai.completions.create(**GOOD | {"model": "nobody"})
    with pytest.raises(openai.BadRequestError, match="greedy"):
        server.openai.completions.create(**GOOD, temperature=1.0)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_hangs_up_frees_its_place(server, stream):
    name = 'ptv2_requests_total{adapter="letters",task="CAUSAL_LM",end="cancelled"}'
    before = server.metric(name)
    body = {"model": "letters", "prompt": endless(server.alone, "letters"), "max_tokens": LONG, "stream": stream}

    async def hang_up():
        async with httpx.AsyncClient(base_url=server.url) as client:
            if not stream:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/v1/completions", json=body, timeout=0.3)
                return
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    assert line.startswith("data: {")
                    assert server.active()
                    return

    asyncio.run(hang_up())
    until(lambda: server.active() == 0, seconds=2.0)
    assert server.metric(name) == before + 1
    assert not server.engine.manager.output_router.result_handlers


def test_more_requests_than_the_queue_holds_are_told_to_come_again(server, monkeypatch):
    import openai

    monkeypatch.setattr(server.engine.options, "max_queue", 2)
    body = {"model": "letters", "prompt": endless(server.alone, "letters"), "max_tokens": LONG, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as first:
        lines = first.iter_lines()
        next(lines)
        refused = server.http.post("/v1/classify", json={"model": "spam", "input": ["anna", "bob"]})
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        # Nothing of it is left in the queue: one place is free.
        assert server.openai.completions.create(**GOOD).choices[0].text == generated(server.alone, "chat", "anna", 2)[0]
        with server.http.stream("POST", "/v1/completions", json=body) as second:
            others = second.iter_lines()
            next(others)
            with pytest.raises(openai.RateLimitError, match="2 requests"):
                server.openai.completions.create(**GOOD)
    until(lambda: server.active() == 0)


def test_metrics_count_requests_tokens_and_seconds(server):
    tags = 'adapter="chat",task="CAUSAL_LM",end="ok"'
    names = [
        f"ptv2_requests_total{{{tags}}}",
        'ptv2_tokens_total{task="CAUSAL_LM",kind="prompt"}',
        'ptv2_tokens_total{task="CAUSAL_LM",kind="generated"}',
        'ptv2_request_seconds_count{task="CAUSAL_LM"}',
        'ptv2_request_seconds_bucket{task="CAUSAL_LM",le="+Inf"}',
        'ptv2_request_seconds_sum{task="CAUSAL_LM"}',
    ]
    before = [server.metric(name) for name in names]
    start = time.perf_counter()
    tokens = sum(server.openai.completions.create(**GOOD).usage.completion_tokens for _ in range(3))
    seconds = time.perf_counter() - start
    grown = [server.metric(name) - old for name, old in zip(names, before, strict=True)]
    assert grown[:5] == [3, 3, tokens, 3, 3] and 0 < grown[5] < seconds
    text = server.http.get("/metrics").text
    assert (server.metric("ptv2_queue_requests"), server.metric("ptv2_batch_requests")) == (0, 0)
    families = re.findall(r"^# TYPE (\w+) (counter|gauge|histogram)$", text, flags=re.MULTILINE)
    assert len(families) == len(set(families)) == 6
    rows = re.findall(r"^(?!#)(.+)$", text, flags=re.MULTILINE)
    assert all(re.fullmatch(r'\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? \d\S*', row) for row in rows)
    buckets = [float(n) for n in re.findall(r'seconds_bucket\{task="CAUSAL_LM",le="\S+"\} (\S+)', text)]
    assert buckets == sorted(buckets) and len(buckets) == 9


def test_an_adapter_is_replaced_while_requests_run_on_the_old_one(changed):
    old = changed.alone
    write_adapters(changed.adapters.parent / "other", seed=5)
    new = PTuningV2Model.from_pretrained(tiny_llama(), changed.adapters.parent / "other")
    long, texts = endless(old, "chat"), ("anna met", "where is bob", "of")
    expected = generated(old, "chat", long, 1000)

    async def replaced():
        async with changed.client() as client:
            running = asyncio.create_task(answers(client, "chat", long, 1000, False, True))
            others = asyncio.create_task(answers(client, "letters", texts[0], 200, False, True))
            await asyncio.sleep(0.1)
            shutil.copytree(changed.adapters.parent / "other" / "chat", changed.adapters / "chat", dirs_exist_ok=True)
            first = changed.engine.served["chat"].version
            while changed.engine.served["chat"].version == first:
                await asyncio.sleep(0.02)
            assert not running.done(), "the request must run on after its adapter was replaced"
            later = [await answers(client, "chat", text, 12, False, False) for text in texts]
            return await running, await others, later

    running_, others, later = asyncio.run(replaced())
    assert running_ == expected
    assert others == generated(old, "letters", texts[0], 200)
    assert later == [generated(new, "chat", text, 12) for text in texts]
    assert later != [generated(old, "chat", text, 12) for text in texts]
    # Nothing of the old one is left.
    until(lambda: len(changed.engine.model.adapters) == 5)
    assert not changed.engine.replaced


def test_folders_come_and_go_and_a_damaged_one_changes_nothing(changed, caplog):
    answer, first = changed.openai.completions.create(**GOOD).choices[0].text, changed.engine.served["chat"].version
    weights = changed.adapters / "chat" / "ptv2_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    (changed.adapters / "notes").mkdir()
    shutil.copytree(changed.adapters / "letters", changed.adapters / "more")
    shutil.rmtree(changed.adapters / "spam")
    until(lambda: changed.engine.served.keys() == {"base", "chat", "letters", "more", "ner"})
    changed.scanned()
    assert len([one for one in caplog.messages if "chat is not loaded" in one]) == 1, "once, and not at every look"
    assert changed.openai.completions.create(**GOOD).choices[0].text == answer
    assert {model.id for model in changed.openai.models.list()} == {"base", "chat", "letters", "more", "ner"}
    found = changed.openai.completions.create(model="more", prompt="anna met", max_tokens=9).choices[0].text
    assert found == generated(changed.alone, "letters", "anna met", 9)[0]
    assert changed.http.post("/v1/classify", json={"model": "spam", "input": "anna"}).status_code == 404
    weights.write_bytes(whole)
    until(lambda: changed.engine.served["chat"].version != first)
    assert changed.openai.completions.create(**GOOD).choices[0].text == answer
    for folder in changed.adapters.iterdir():
        shutil.rmtree(folder)
    until(lambda: [model.id for model in changed.openai.models.list()] == ["base"])
    assert changed.openai.completions.create(**GOOD | {"model": "base"}).choices[0].text


def test_a_server_that_samples_serves_both(tmp_path):
    with running(tmp_path, "--sample") as server:
        expected = generated(server.alone, "letters", "anna met", 12)[0]
        given = {"model": "letters", "prompt": "anna met", "max_tokens": 12}

        def texts(**how):
            return {server.openai.completions.create(**given, **how).choices[0].text for _ in range(6)}

        assert texts(temperature=0) == texts(top_p=1e-6) == texts(temperature=1e-4) == {expected}
        assert len(texts(temperature=2.0)) > 1 and len(texts()) > 1


def test_pages_that_a_single_request_could_outgrow_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--model", "m", "--adapters", "a", "--cache-tokens", "2559"])
    with pytest.raises(SystemExit):
        script().options_of()
    assert "--cache-tokens must hold" in capsys.readouterr().err


def test_requests_that_outgrow_the_pages_together_wait_for_one_another(tmp_path):
    sizes = ("--cache-tokens", 128, "--max-tokens", 64, "--batch-tokens", 32)
    with running(tmp_path, *sizes) as server:
        cases = [
            (name, text, 50) for name in ("base", "chat", "letters") for text in ("anna met", "of", "where is bob")
        ]

        async def together():
            async with server.client() as client:
                return await asyncio.gather(*(answers(client, *case, False, True) for case in cases))

        assert asyncio.run(together()) == [generated(server.alone, *case) for case in cases]
        assert server.http.get("/v1/models").status_code == 200


def test_a_request_may_fill_the_pages_to_the_last(tmp_path):
    sizes = ("--cache-tokens", 70, "--max-prompt", 30, "--max-tokens", 40)
    with running(tmp_path, *sizes) as server:
        text = " ".join([endless(server.alone, "letters")] * 30)
        expected = generated(server.alone, "letters", text, 40)
        for _ in range(2):
            answer = server.openai.completions.create(model="letters", prompt=text, max_tokens=40)
            assert answer.choices[0].text == expected[0] and answer.usage.completion_tokens == expected[2]


def test_a_server_whose_model_has_stopped_says_so(tmp_path, monkeypatch):
    import openai

    with running(tmp_path) as server:

        def broken(*args, **kwargs):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(server.engine.manager.batch_processor, "_generation_step", broken)
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            server.openai.completions.create(**GOOD)
        until(lambda: server.http.get("/v1/models").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="stopped"):
            server.openai.completions.create(**GOOD)
        assert not server.engine.jobs


def test_a_signal_lets_requests_end(tmp_path):
    import openai

    llama_folder(tmp_path / "llama")
    write_adapters(tmp_path / "adapters")
    alone = PTuningV2Model.from_pretrained(tiny_llama(), tmp_path / "adapters")
    folders = ["--model", str(tmp_path / "llama"), "--adapters", str(tmp_path / "adapters")]
    process = started([SCRIPT, *folders, "--port", 0], tmp_path)
    try:
        text = endless(alone, "letters")
        address = re.compile(r"running on (http://\S+)")
        until(lambda: not process.is_alive() or address.search((tmp_path / "stderr").read_text()), seconds=60)
        found = address.search((tmp_path / "stderr").read_text())
        assert found, (tmp_path / "stderr").read_text()
        body = {"model": "letters", "prompt": text, "max_tokens": 300, "stream": True}
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none")
        parts = []
        for event in client.completions.create(**body):
            if not parts:
                os.kill(process.pid, signal.SIGTERM)
            parts.append(event.choices[0])
        process.join(30)
    finally:
        process.kill()
    assert ("".join(part.text for part in parts), parts[-1].finish_reason) == generated(alone, "letters", text, 300)[:2]
    assert "shutdown complete" in (tmp_path / "stderr").read_text()


def test_a_folder_that_is_none_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--model", "m", "--adapters", "nowhere"])
    with pytest.raises(SystemExit, match="--adapters must be a folder, which may be empty; got nowhere"):
        script().app_of(script().options_of())


def test_replicas_answer_as_the_model_alone(tmp_path):
    pytest.importorskip("ray")
    import openai

    llama_folder(tmp_path / "llama")
    write_adapters(tmp_path / "adapters")
    alone, port = PTuningV2Model.from_pretrained(tiny_llama(), tmp_path / "adapters"), free_port()
    folders = ["--model", tmp_path / "llama", "--adapters", tmp_path / "adapters", "--port", port]
    command = [sys.executable, SCRIPT.with_name("replicas.py"), *folders]
    process = subprocess.Popen(list(map(str, command)))
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=60)
        for name in ("chat", "letters"):
            answer = client.completions.create(model=name, prompt="anna met", max_tokens=7).choices[0]
            assert (answer.text, answer.finish_reason) == generated(alone, name, "anna met", 7)[:2]
    finally:
        process.terminate()
        process.wait(60)
