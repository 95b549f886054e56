"""examples/serve.py under load: many clients at once, each answer compared with what the model gives alone.

    python -m benchmarks.host.serve_load --model FOLDER --adapters FOLDER --minutes 5

The folder holds the adapters of examples/one_model_many_tasks.py: chat, ner and spam. chat is replaced now and then by
another version of itself; some clients hang up. It prints one JSON object; the exit status is 1 where an answer was
wrong, or none came.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "serve.py"
ASKED = (
    "When do you open?", "Where can I park?", "Do you sell bread?", "Is there a train to Rome tonight?", "Who are you?",
    "What is the capital of France?",
)  # fmt: skip
BEGUN = (
    "The capital of France is", "One, two, three,", "Once upon a time there was", "The recipe needs flour,",
    "In the morning we", "She opened the door and",
)  # fmt: skip
READ = (
    "Ada Lovelace met Charles in Paris .", "Claim your free prize today", "The meeting in London is on Monday .",
    "You have won a ticket to Rome", "Are you coming to Bob's dinner?", "IBM opens a bureau in New York .", "Call now!",
)  # fmt: skip
NEW_TOKENS = 8
# Two logits that are as near as this are in an order that a batch's other rounding may turn.
TIE = 1e-3
# Seconds in which either version of a replaced adapter may answer: its folder is looked at every two.
CHANGING = 8.0


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True, help="folder with chat, ner and spam")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--replace-every", type=float, default=20.0, help="seconds")
    parser.add_argument("--hang-up", type=float, default=0.05, help="share of the requests")
    return parser.parse_args()


def serve_module() -> ModuleType:
    """examples/serve.py as a module."""
    # As `python examples/serve.py` has it.
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("serve_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    sys.modules["serve_example"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Alone:
    """What the model gives alone: greedy texts with the least margin on their way, and what heads give."""

    def __init__(self, model: Path, adapters: Path, other: Path) -> None:
        import transformers

        from ptv2_fast import PTuningV2Model

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        self.model = PTuningV2Model.from_pretrained(base, adapters / "chat", adapter_name="chat")
        for name in ("ner", "spam"):
            self.model.load_adapter(adapters / name, name)
        # Another version of chat: a quarter as strong.
        with torch.no_grad():
            for parameter in self.model.adapters["chat"].parameters():
                parameter.mul_(0.25)
        self.model.save_pretrained(other, adapter_names=["chat"])
        self.model.load_adapter(other, "other")
        self.model.delete_adapter("chat")
        self.model.load_adapter(adapters / "chat", "chat")

    def texts(self) -> dict[tuple[str, str, bool], tuple[str, float]]:
        """(adapter, text, whether as a chat) -> what comes, and the least margin between the first two logits."""
        found = {}
        for name in ("base", "chat", "other"):
            for text in (*ASKED, *BEGUN):
                row = "__base__" if name == "base" else name
                found[name, text, text in ASKED] = self._generated(row, text, text in ASKED)
        return found

    def _generated(self, name: str, text: str, chat: bool) -> tuple[str, float]:
        if chat:
            asked = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids
        how = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "output_logits": True, "return_dict_in_generate": True}
        output = self.model.generate(ids, adapter_names=[name], **how)
        margins = [float(best[0] - best[1]) for best in (step[0].topk(2).values for step in output.logits)]
        return self.tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True), min(margins)

    @torch.no_grad()
    def read(self, module: ModuleType) -> dict[tuple[str, str], Any]:
        """(adapter, text) -> the scores of its classes, or its entities."""
        found: dict[tuple[str, str], Any] = {}
        for text in READ:
            encoded = self.tokenizer(text, return_offsets_mapping=True)
            ids = torch.tensor([encoded.input_ids])
            logits = {name: self.model(input_ids=ids, adapter_names=[name]).logits[0] for name in ("ner", "spam")}
            labels = {name: self.model.ptv2_config[name].heads[name].labels for name in logits}
            found["spam", text] = dict(zip(labels["spam"], logits["spam"].softmax(-1).tolist(), strict=True))
            job = SimpleNamespace(text=text, encoded=encoded, served=SimpleNamespace(labels=labels["ner"]))
            found["ner", text] = module.entities(job, logits["ner"])
        return found


class Load:
    """Clients of one server, and what became of their requests."""

    def __init__(self, options: argparse.Namespace, url: str, texts: dict, read: dict) -> None:
        import httpx2
        import openai

        self.options, self.texts, self.read = options, texts, read
        limits = httpx2.Limits(max_connections=None)
        self.http = httpx2.AsyncClient(base_url=url, timeout=120, limits=limits)
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self.seconds: dict[str, list[float]] = {}
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.versions = ["chat"]  # of chat, which may answer now

    async def client(self, seed: int, until: float) -> None:
        draw = random.Random(seed)
        while time.monotonic() < until:
            kind = draw.choice(("completion", "completion streamed", "chat", "chat streamed", "classify", "tag"))
            start = time.monotonic()
            try:
                if kind in ("classify", "tag"):
                    how = await self.reads(kind, draw)
                else:
                    how = await self.generates(kind, draw)
            except Exception as error:
                how = "lost"
                self.wrong.append(f"{kind}: {type(error).__name__}: {error}")
            self.ends[how] += 1
            if how != "hung up":
                self.seconds.setdefault(kind, []).append(time.monotonic() - start)

    async def generates(self, kind: str, draw: random.Random) -> str:
        chat, name, text = (
            kind.startswith("chat"),
            draw.choice(("base", "chat")),
            draw.choice(ASKED if kind.startswith("chat") else BEGUN),
        )
        call = self.openai.chat.completions if chat else self.openai.completions
        given: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        given |= {"model": name, "max_tokens": NEW_TOKENS}
        allowed = set(self.versions) if name == "chat" else {"base"}
        hangs_up = draw.random() < self.options.hang_up
        if not kind.endswith("streamed"):
            waiting = asyncio.ensure_future(call.create(**given))
            if hangs_up:
                await asyncio.sleep(0.3)
                waiting.cancel()
                return "hung up"
            choice = (await waiting).choices[0]
            answer = choice.message.content if chat else choice.text
        else:
            parts, reason = [], None
            async with await call.create(**given, stream=True) as stream:
                async for event in stream:
                    choice = event.choices[0]
                    parts.append(choice.delta.content if chat else choice.text)
                    reason = choice.finish_reason
                    if hangs_up:
                        return "hung up"
            if reason is None:
                raise RuntimeError("the stream ended before the text did")
            answer = "".join(parts)
        allowed |= set(self.versions) if name == "chat" else set()
        expected = [self.texts[version, text, chat] for version in sorted(allowed)]
        if answer in [one for one, _ in expected]:
            return "right"
        if any(margin < TIE for _, margin in expected):
            return "right up to a tie"
        self.wrong.append(f"{kind} of {name}: {text!r} gave {answer!r} for {expected!r}")
        return "wrong"

    async def reads(self, kind: str, draw: random.Random) -> str:
        name, texts = ("spam" if kind == "classify" else "ner"), draw.sample(READ, draw.randint(1, 3))
        body = {"model": name, "input": texts if len(texts) > 1 else texts[0]}
        if draw.random() < self.options.hang_up:
            waiting = asyncio.ensure_future(self.http.post(f"/v1/{kind}", json=body))
            await asyncio.sleep(0.05)
            waiting.cancel()
            return "hung up"
        answer = (await self.http.post(f"/v1/{kind}", json=body)).raise_for_status().json()["data"]
        for text, one in zip(texts, answer, strict=True):
            expected = self.read[name, text]
            if not near(one["scores"] if kind == "classify" else one["entities"], expected):
                self.wrong.append(f"{kind}: {text!r} gave {one!r} for {expected!r}")
                return "wrong"
        return "right"

    async def replacing(self, places: dict[str, Path], served: Path, until: float) -> None:
        """Put the other version of chat into its folder, now and then."""
        now = "chat"
        while time.monotonic() + self.options.replace_every < until:
            await asyncio.sleep(self.options.replace_every - CHANGING)
            now = "other" if now == "chat" else "chat"
            self.versions = ["chat", "other"]
            for path in places[now].iterdir():
                shutil.copy(path, served / f"new-{path.name}")
                os.replace(served / f"new-{path.name}", served / path.name)
            await asyncio.sleep(CHANGING)
            self.versions = [now]
            self.ends["replacements of chat"] += 1


def near(found: Any, expected: Any) -> bool:
    """Whether two values of JSON are the same but for the last digits of their numbers."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(near(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(near, found, expected))
    return abs(found - expected) < TIE if isinstance(expected, float) else found == expected


def started(command: list[str], log: Path) -> tuple[subprocess.Popen, str]:
    """A server's process and its address."""
    process = subprocess.Popen(command, stderr=log.open("w"), stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        if found := re.search(r"running on (http://\S+)", log.read_text()):
            return process, found[1]
        time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"the server did not start:\n{log.read_text()}")


async def measured(load: Load, process: subprocess.Popen, places: dict[str, Path], served: Path) -> dict[str, Any]:
    """Run the load; the server's memory in MiB by second."""
    import psutil

    start = time.monotonic()
    until = start + 60 * load.options.minutes
    work = [load.client(seed, until) for seed in range(load.options.clients)]
    running = asyncio.gather(*work, load.replacing(places, served, until))
    memory: dict[float, float] = {}
    watched = psutil.Process(process.pid)
    while not running.done():
        memory[time.monotonic() - start] = watched.memory_info().rss / 2**20
        await asyncio.wait([running], timeout=2.0)
    running.result()
    seconds = time.monotonic() - start
    await asyncio.sleep(5.0)
    gauges = re.findall(r"^ptv2_(\w+_requests) (\S+)$", (await load.http.get("/metrics")).text, flags=re.MULTILINE)
    answered = [one for kind in load.seconds.values() for one in kind]
    after_a_minute = [size for at, size in memory.items() if at >= min(60.0, 0.2 * seconds)]
    return {
        "clients": load.options.clients,
        "seconds": round(seconds, 1),
        "requests a second": round(len(answered) / seconds, 2),
        "ends": dict(load.ends),
        "expected texts": {
            "all": len(load.texts), "not empty": sum(bool(text) for text, _ in load.texts.values()),
            "of chat, told from its other version": told_apart(load.texts, "chat", "other"),
            "of chat, told from the base": told_apart(load.texts, "chat", "base"),
            "least margin of two logits": round(min(margin for _, margin in load.texts.values()), 5),
        },
        "latency": {kind: quantiles(found) for kind, found in {**load.seconds, "all": answered}.items()},
        "memory in MiB": {
            "after a minute": round(after_a_minute[0]), "at the end": round(after_a_minute[-1]),
            "most": round(max(memory.values())),
        },
        "left in the server": dict(gauges),
        "wrong": load.wrong[:10],
    }  # fmt: skip


def told_apart(texts: dict[tuple[str, str, bool], tuple[str, float]], first: str, second: str) -> int:
    """How many texts two adapters go on with differently."""
    asked = {key[1:] for key in texts}
    return sum(texts[(first, *key)][0] != texts[(second, *key)][0] for key in asked)


def quantiles(seconds: list[float]) -> dict[str, float]:
    """How many, their median and their 95th percentile."""
    cuts = statistics.quantiles(seconds, n=20) if len(seconds) > 1 else seconds * 19
    return {"n": len(seconds), "p50": round(cuts[9], 3), "p95": round(cuts[18], 3)}


def main() -> int:
    options = options_of()
    with tempfile.TemporaryDirectory() as folder:
        served, other = Path(folder) / "served", Path(folder) / "other"
        for name in ("chat", "ner", "spam"):
            shutil.copytree(options.adapters / name, served / name)
        alone = Alone(options.model, options.adapters, other)
        texts, read = alone.texts(), alone.read(serve_module())
        print(f"{len(texts) + len(read)} answers of the model alone", file=sys.stderr, flush=True)
        del alone
        command = [sys.executable, str(SCRIPT), "--model", str(options.model), "--adapters", str(served), "--port", "0"]
        process, url = started(command, Path(folder) / "log")

        async def run() -> dict[str, Any]:
            load = Load(options, url, texts, read)
            return await measured(load, process, {"chat": options.adapters / "chat", "other": other}, served / "chat")

        try:
            record = asyncio.run(run())
        finally:
            process.terminate()
            process.wait(60)
    print(json.dumps(record, indent=2))
    bad = record["ends"].get("wrong", 0) + record["ends"].get("lost", 0)
    return 1 if bad or any(float(value) for value in record["left in the server"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
