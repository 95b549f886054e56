"""examples/serve.py in a thread of this process, asked over sockets, beside the model that answers alone."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, get_ptv2_model
from tiny_folders import FILLERS, PEOPLE, llama_folder, tiny_llama, tiny_tokenizer

httpx = pytest.importorskip("httpx2", reason="the client of openai's package")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
# Imported where it is used: it takes seconds, and every process collects every test.
if importlib.util.find_spec("openai") is None:
    pytest.skip("needs openai", allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "examples" / "serve.py"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}?"
TAGS, CLASSES = ["O", "B-PER", "I-PER", "B-LOC"], ["ham", "spam"]
LONG = 1500  # tokens: seconds of work


def write_adapters(folder: Path, seed: int = 0) -> None:
    """A sub-folder for each of four adapters, whose prompts are strong enough to change every answer."""
    base = tiny_llama()
    torch.manual_seed(seed)
    strong = {"num_virtual_tokens": 3, "init_std": 1.0}
    configs = {
        "chat": PTuningV2Config("CAUSAL_LM", injection="prefix", **strong),
        "letters": PTuningV2Config("CAUSAL_LM", **strong),
        "ner": PTuningV2Config("TOKEN_CLS", heads={"ner": HeadConfig("TOKEN_CLS", 4, labels=TAGS)}, **strong),
        "spam": PTuningV2Config("SEQ_CLS", heads={"spam": HeadConfig("SEQ_CLS", 2, "mean", labels=CLASSES)}, **strong),
    }
    model = get_ptv2_model(base, configs["chat"], "chat")
    for name in list(configs)[1:]:
        model.add_adapter(name, configs[name])
    with torch.no_grad():
        for name in ("ner", "spam"):
            for parameter in model.adapters[name].heads.parameters():
                parameter.normal_()
    model.save_pretrained(folder)


def script():
    """examples/serve.py as a module."""
    if "serve_example" not in sys.modules:
        # As `python examples/serve.py` has it.
        sys.path.insert(0, str(SCRIPT.parent))
        spec = importlib.util.spec_from_file_location("serve_example", SCRIPT)
        sys.modules["serve_example"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["serve_example"]


class Running:
    """A server in a thread of this process."""

    def __init__(self, engine, port: int, adapters: Path) -> None:
        self.engine, self.adapters, self.url = engine, adapters, f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = importlib.import_module("openai").OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.alone = PTuningV2Model.from_pretrained(tiny_llama(), adapters)

    def client(self):
        """OpenAI's client for coroutines, which belongs to one event loop."""
        return importlib.import_module("openai").AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def metric(self, name: str) -> float:
        """The value of a metric, 0 where there is none."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.http.get("/metrics").text, flags=re.MULTILINE)
        return float(found[1]) if found else 0.0

    def active(self) -> int:
        """How many requests the model's manager has."""
        scheduler = self.engine.manager.batch_processor.scheduler
        return len(scheduler.active_requests) + len(scheduler.waiting_requests) + len(self.engine.jobs)

    def scanned(self) -> None:
        """Wait for some more looks into the folder."""
        time.sleep(4 * self.engine.options.poll)


@contextmanager
def running(folder: Path, *arguments: object):
    llama_folder(folder / "llama")
    tokenizer = tiny_tokenizer(causal=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "llama")
    write_adapters(folder / "adapters")
    with pytest.MonkeyPatch.context() as patch:
        settings = ("--model", folder / "llama", "--adapters", folder / "adapters", "--poll", 0.1, "--max-prompt", 40)
        patch.setattr(sys, "argv", ["serve.py", *map(str, (*settings, "--max-tokens", LONG, *arguments))])
        app = script().app_of(script().options_of())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield Running(app.state.engine, server.servers[0].sockets[0].getsockname()[1], folder / "adapters")
    finally:
        server.should_exit = True
        thread.join(30)
    assert not app.state.engine.manager.is_running() and not thread.is_alive()


def generated(model, name: str, text: str, most: int) -> tuple[str, str, int]:
    """What the model alone goes on with: the text, why it ends and how many tokens it has."""
    tokenizer = tiny_tokenizer(causal=True)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    row = "__base__" if name == "base" else name
    tokens = model.generate(ids, max_new_tokens=most, do_sample=False, adapter_names=[row])[0, ids.shape[1] :]
    reason = "stop" if tokens[-1] == tokenizer.eos_token_id else "length"
    return tokenizer.decode(tokens, skip_special_tokens=True), reason, len(tokens)


_ENDLESS: dict[str, str] = {}


def endless(model, name: str) -> str:
    """A text that an adapter goes on with for long: greedy texts that did not end by then repeat themselves.

    Looked for once: the first adapters of every server have the same weights.
    """
    if name not in _ENDLESS:
        texts = (*FILLERS, *PEOPLE)
        _ENDLESS[name] = next(text for text in texts if generated(model, name, text, 400)[1] == "length")
    return _ENDLESS[name]


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def answers(client, name: str, text: str, most: int, chat: bool, stream: bool):
    """What a server gives, in the form of `generated`."""
    call = client.chat.completions if chat else client.completions
    given = {"messages": messages(text)} if chat else {"prompt": text}
    given |= {"model": name, "max_tokens": most}
    if not stream:
        answer = await call.create(**given)
        choice = answer.choices[0]
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        return choice.message.content if chat else choice.text, choice.finish_reason, answer.usage.completion_tokens
    parts, reason, usage = [], None, None
    async for event in await call.create(**given, stream=True, stream_options={"include_usage": True}):
        usage = event.usage or usage
        for choice in event.choices:
            assert reason is None, "something follows the end"
            parts.append(choice.delta.content if chat else choice.text)
            reason = choice.finish_reason
    return "".join(parts), reason, usage.completion_tokens


def until(fits, seconds: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not fits():
        assert time.monotonic() < end
        time.sleep(0.02)
