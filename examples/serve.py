"""A server in OpenAI's form: one frozen language model, and a folder of adapters whose requests share its batches.

    python examples/serve.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapters three-prompts

Every sub-folder that save_pretrained wrote is a model of this server; docs/serving.md says the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import transformers as hf
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from ptv2_fast import PTuningV2Config, get_ptv2_model

BASE = "base"  # the name of the model without an adapter
ROUTES = {"CAUSAL_LM": "/v1/completions", "SEQ_CLS": "/v1/classify", "TOKEN_CLS": "/v1/tag"}
SCORES = {"regression": torch.Tensor.float, "multi_label_classification": torch.sigmoid}
KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
SECONDS = ("0.01", "0.03", "0.1", "0.3", "1", "3", "10", "30", "+Inf")
# Words as tagged corpora split them: inner apostrophes, hyphens and points belong to them, other signs stand alone.
WORD = re.compile(r"\w+(?:['’\-.,]\w+)*|[^\w\s]")


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub name or folder of a causal language model")
    parser.add_argument("--adapters", type=Path, required=True, help="folder with a sub-folder for each adapter")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--sample", action="store_true", help="serve temperature and top_p; without it all is greedy")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-queue", type=int, default=256, help="requests that wait or run; others are told 429")
    parser.add_argument("--max-prompt", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--max-tokens", type=int, default=512, help="new tokens of a request, also where it says none")
    parser.add_argument("--cache-tokens", type=int, default=16384, help="tokens that the pages hold, of all requests")
    parser.add_argument("--batch-tokens", type=int, default=512, help="tokens that one step reads")
    parser.add_argument("--poll", type=float, default=2.0, help="seconds between two looks into --adapters")
    options = parser.parse_args()
    if options.max_prompt + options.max_tokens > options.cache_tokens:
        parser.error("--cache-tokens must hold --max-prompt and --max-tokens together")
    return options


class Read(BaseModel, extra="forbid"):  # what is not served is refused
    model: str
    input: str | list[str] = Field(min_length=1)


class Generate(BaseModel, extra="forbid"):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] = {}
    n: Literal[1] = 1


class Completion(Generate):
    prompt: str


class Message(BaseModel, extra="forbid"):
    role: str
    content: str


class Chat(Generate):
    messages: list[Message] = Field(min_length=1)


class Engine:
    """The model, which the manager's thread alone runs; everything else here belongs to the event loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.tokenizer = options, hf.AutoTokenizer.from_pretrained(options.model)
        base = hf.AutoModelForCausalLM.from_pretrained(options.model)
        # A model has one adapter at least, and the folder may be empty: this one is never served.
        self.model = get_ptv2_model(base, PTuningV2Config("CAUSAL_LM", num_virtual_tokens=1), "unserved").eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        ends = base.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        # Each request brings its own temperature and top_p; these say that there are such.
        sampled = {"do_sample": True, "temperature": 0.5, "top_p": 0.5, "top_k": 0} if options.sample else {}
        config = hf.GenerationConfig(**{"do_sample": False, "eos_token_id": ends, **sampled})
        blocks = -(-options.cache_tokens // 32)
        sizes = {"page_size": 32, "num_blocks": blocks, "max_batch_tokens": options.batch_tokens}
        pages = hf.ContinuousBatchingConfig(**sizes, per_request_processors=options.sample)
        self.manager = self.model.init_continuous_batching(config, pages)
        # By its folder's name, each adapter's name in the model: every load has a new one.
        self.served = {BASE: SimpleNamespace(name=BASE, version="__base__", task="CAUSAL_LM")}
        self.seen: dict[str, Any] = {}  # of each folder the state that was loaded, or could not be
        self.jobs, self.replaced, self.counts = {}, set(), Counter()

    async def watch(self) -> None:
        """Follow the folder. A request ends on the adapter that it began with, which is deleted after the last one."""
        while True:
            await asyncio.sleep(self.options.poll)
            await self.scan()
            for version in self.replaced - {job.served.version for job in self.jobs.values()}:
                self.model.delete_adapter(version)
                self.replaced.discard(version)
            while self.manager.get_result(timeout=0) is not None:
                pass  # what was on its way to clients that hung up

    async def scan(self) -> None:
        """Load what is new or changed beside what runs; a folder that cannot be loaded leaves the old adapter."""
        states: dict[str, list] = {}
        for path in sorted(self.options.adapters.glob("*/ptv2_*")):
            with suppress(OSError):
                states.setdefault(path.parent.name, []).append((path.stat().st_mtime_ns, path.stat().st_size))
        states.pop(BASE, None)
        for name in [name for name in self.seen | states if self.seen.get(name) != states.get(name)]:
            self.seen[name], new = states.get(name), None
            try:
                new = await asyncio.to_thread(self.load, name) if states.get(name) else None
            except Exception as error:  # a folder may hold anything
                logging.error("adapter %s is not loaded: %s", name, error)
                continue
            old = self.served.pop(name, None)
            self.replaced |= {old.version} if old else set()
            self.served |= {name: new} if new else {}
            logging.info("adapter %s is %s", name, "replaced" if new and old else "loaded" if new else "removed")

    def load(self, name: str) -> SimpleNamespace:
        version = f"{name}-{uuid.uuid4().hex}"
        self.model.load_adapter(self.options.adapters / name, version)
        config = self.model.ptv2_config[version]
        served = SimpleNamespace(name=name, version=version, task=config.task_type)
        for head in (config.heads or {}).values():
            served.labels = head.labels or [f"LABEL_{label}" for label in range(head.num_labels)]
            served.scores = SCORES.get(head.problem_type, lambda logits: logits.softmax(-1))
        return served

    def submit(self, model: str, task: str, text: str, special: bool = True, **how: Any) -> SimpleNamespace:
        """Begin a request, or refuse it."""
        most, served = self.options.max_prompt, self.served.get(model)
        if served is None:
            raise HTTPException(404, f"model must be one of {', '.join(self.served)}; got {model!r}")
        if served.task != task:
            raise HTTPException(400, f"model {model!r} is for {served.task} ({ROUTES.get(served.task, 'not served')})")
        fits = len(text) <= 32 * most and not re.search("[\ud800-\udfff]", text)  # or nobody splits it
        encoded = self.tokenizer(text if fits else "", return_offsets_mapping=True, add_special_tokens=special)
        if not fits or not 0 < len(encoded.input_ids) <= most:
            raise HTTPException(400, f"a prompt must be Unicode, of 1 to {most} tokens")
        if len(self.jobs) >= self.options.max_queue:
            raise HTTPException(429, f"{len(self.jobs)} requests wait or run already", {"Retry-After": "1"})
        job = SimpleNamespace(id=f"ptv2-{uuid.uuid4().hex}", served=served, text=text, encoded=encoded, tokens=[])
        job.started, job.outputs, self.jobs[job.id] = time.perf_counter(), asyncio.Queue(), job
        self.manager.register_result_handler(job.id, lambda output: self.take(job, output))
        try:
            if self.manager.add_request(encoded.input_ids, job.id, adapter_name=served.version, **how) is None:
                raise HTTPException(503, "the model has stopped")
        except Exception as error:
            self.end(job, "refused")
            raise HTTPException(400, str(error)) if isinstance(error, ValueError) else error from None
        return job

    def take(self, job: SimpleNamespace, output: Any) -> None:
        job.tokens = output.generated_tokens
        job.outputs.put_nowait(output)
        if output.is_finished():
            self.end(job, "failed" if output.error else "ok")

    def end(self, job: SimpleNamespace, how: str = "cancelled") -> None:
        """Forget a job, unless that is done; one that still waits or runs frees its place."""
        if self.jobs.pop(job.id, None) is None:
            return
        if how in ("cancelled", "stopped"):
            self.manager.cancel_request(job.id)
        self.manager.output_router.result_handlers.pop(job.id, None)
        task, seconds = job.served.task, time.perf_counter() - job.started
        self.counts[f'requests_total{{adapter="{job.served.name}",task="{task}",end="{how}"}}'] += 1
        self.counts[f'tokens_total{{task="{task}",kind="prompt"}}'] += len(job.encoded.input_ids)
        self.counts[f'tokens_total{{task="{task}",kind="generated"}}'] += len(job.tokens)
        for bound in SECONDS:
            self.counts[f'request_seconds_bucket{{task="{task}",le="{bound}"}}'] += seconds <= float(bound)
        self.counts[f'request_seconds_sum{{task="{task}"}}'] += seconds
        self.counts[f'request_seconds_count{{task="{task}"}}'] += 1

    async def outputs(self, job: SimpleNamespace, request: Request) -> AsyncIterator[Any]:
        """A job's outputs as they come; whoever stops reading, or hangs up, ends it."""
        try:
            while not await request.is_disconnected():
                with suppress(asyncio.TimeoutError):
                    output = await asyncio.wait_for(job.outputs.get(), timeout=0.5)
                    if output.error:
                        raise HTTPException(500, output.error)
                    yield output
                    if output.is_finished():
                        return
            raise HTTPException(499, "the client is gone")
        finally:
            self.end(job)

    async def pieces(self, job: SimpleNamespace, request: Request, stops: list[str]) -> AsyncIterator[tuple]:
        """New text as it comes, and, with the last of it, why it ends."""
        sent, held = 0, max(map(len, stops), default=1) - 1
        async for output in self.outputs(job, request):
            text, reason = self.tokenizer.decode(output.generated_tokens, skip_special_tokens=True), None
            found = [text.index(stop) for stop in stops if stop in text]
            if found:
                text, reason = text[: min(found)], "stop"
            elif output.is_finished():
                reason = "stop" if output.generated_tokens[-1] in self.ends else "length"
            # At the end may be the beginning of a stop, or of a character.
            until = len(text) if reason else len(text.rstrip("\ufffd")) - held
            if until > sent or reason:
                yield text[sent:until], reason
                sent = max(sent, until)
            if reason:
                self.end(job, "stopped")
                break

    async def read(self, body: Read, request: Request, task: str) -> list[tuple[SimpleNamespace, torch.Tensor]]:
        """What an adapter's head gives for each text."""
        jobs, texts = [], [body.input] if isinstance(body.input, str) else body.input
        try:
            for text in texts:
                jobs.append(self.submit(body.model, task, text))
            return [(job, output.logits.float()) for job in jobs async for output in self.outputs(job, request)]
        finally:
            for job in jobs:
                self.end(job)

    def metrics(self) -> str:
        """Prometheus' text form."""
        processor = self.manager.batch_processor
        active = len(processor.scheduler.active_requests) if processor else 0
        gauges = {"batch_requests": active, "queue_requests": max(0, len(self.jobs) - active)}
        kinds = dict.fromkeys(("requests_total", "refused_total", "tokens_total"), "counter")
        text = ""
        for family, kind in {**kinds, "request_seconds": "histogram", **dict.fromkeys(gauges, "gauge")}.items():
            rows = [row for row in {**self.counts, **gauges}.items() if row[0].startswith(family)]
            text += f"# TYPE ptv2_{family} {kind}\n" + "".join(f"ptv2_{name} {value:.9g}\n" for name, value in rows)
        return text


def entities(job: SimpleNamespace, logits: torch.Tensor) -> list[dict[str, Any]]:
    """A text's entities. A word has the tag of its last token, where a decoder has read all of it."""
    tokens = [one for one in zip(job.encoded.offset_mapping, *logits.softmax(-1).max(-1), strict=True) if any(one[0])]
    starts, found, last = [start for (start, _), _, _ in tokens], [], "O"
    for word in WORD.finditer(job.text):
        _, score, tag = tokens[bisect.bisect_left(starts, word.end()) - 1]
        side, kind = re.fullmatch(r"(?:([BIES])-)?(.*)", job.served.labels[tag]).groups()
        if kind != "O" and (kind != last or side in ("B", "S")):
            found.append({"start": word.start(), "label": kind, "scores": []})
        if kind != "O":
            found[-1] |= {"end": word.end(), "scores": [*found[-1]["scores"], float(score)]}
        last = kind
    for one in found:
        scores = one.pop("scores")
        one |= {"text": job.text[one["start"] : one["end"]], "score": sum(scores) / len(scores)}
    return found


def described(status: int, message: str) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def app_of(options: argparse.Namespace) -> FastAPI:
    """The server as an ASGI application; `app.state.engine` has the model."""
    engine = Engine(options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.scan()
        engine.manager.start()
        watcher = asyncio.create_task(engine.watch())
        yield
        watcher.cancel()
        # Whoever runs this application has waited for its clients by now.
        await asyncio.to_thread(engine.manager.stop, hard_stop=True)

    app = FastAPI(title="ptv2_fast", lifespan=lifespan)
    app.state.engine = engine

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        engine.counts[f'refused_total{{status="{error.status_code}"}}'] += 1
        return JSONResponse(described(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return await refused(request, HTTPException(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return await refused(request, HTTPException(500, "the server failed; its log says why"))

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(engine.metrics())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        if not engine.manager.is_running():
            raise HTTPException(503, "the model has stopped")
        about = {"object": "model", "created": 0, "owned_by": "ptv2_fast"}
        return {"object": "list", "data": [{"id": s.name, **about, "task": s.task} for s in engine.served.values()]}

    @app.post("/v1/classify")
    async def classify(body: Read, request: Request) -> dict[str, Any]:
        read = await engine.read(body, request, "SEQ_CLS")
        scores = [dict(zip(job.served.labels, job.served.scores(logits).tolist(), strict=True)) for job, logits in read]
        best = [max(one, key=one.get) for one in scores]
        data = [{"label": b, "score": one[b], "scores": one} for b, one in zip(best, scores, strict=True)]
        return {"object": "list", "model": body.model, "data": data}

    @app.post("/v1/tag")
    async def tag(body: Read, request: Request) -> dict[str, Any]:
        read = await engine.read(body, request, "TOKEN_CLS")
        return {"object": "list", "model": body.model, "data": [{"entities": entities(*one)} for one in read]}

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Any:
        return await generate(body, request, "text_completion", body.prompt)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Any:
        messages = [one.model_dump() for one in body.messages]
        try:
            text = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a model's own template raises
            raise HTTPException(400, f"messages do not fit the model's chat template: {error}") from error
        return await generate(body, request, "chat.completion", text, special=False)

    async def generate(body: Generate, request: Request, kind: str, text: str, **how: Any) -> Any:
        if not options.sample and (body.temperature or body.top_p not in (None, 1)):
            raise HTTPException(400, "temperature must be 0: this server is greedy; one with --sample is not")
        if options.sample:  # with top_p at 0 the most probable token alone is left
            greedy = body.temperature == 0
            how |= {"temperature": body.temperature or 1.0, "top_p": 0.0 if greedy else body.top_p or 1.0}
        most = body.max_completion_tokens or body.max_tokens or options.max_tokens
        if most > options.max_tokens:
            raise HTTPException(400, f"max_tokens must be at most {options.max_tokens}; got {most}")
        job = engine.submit(body.model, "CAUSAL_LM", text, max_new_tokens=most, streaming=True, **how)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        pieces = engine.pieces(job, request, [stop for stop in stops if stop])
        head = {"id": job.id, "object": kind, "created": int(time.time()), "model": body.model}

        def choices(text: str, reason: str | None, key: str = "delta") -> dict[str, Any]:
            content = {"text": text} if kind == "text_completion" else {key: {"role": "assistant", "content": text}}
            return {"choices": [{"index": 0, **content, "logprobs": None, "finish_reason": reason}]}

        def usage() -> dict[str, Any]:
            old, new = len(job.encoded.input_ids), len(job.tokens)
            return {"usage": {"prompt_tokens": old, "completion_tokens": new, "total_tokens": old + new}}

        if not body.stream:
            parts = [piece async for piece in pieces]
            return {**head, **choices("".join(text for text, _ in parts), parts[-1][1], "message"), **usage()}

        async def events() -> AsyncIterator[str]:
            head["object"] = "chat.completion.chunk" if kind == "chat.completion" else kind
            try:
                async for piece in pieces:
                    yield f"data: {json.dumps({**head, **choices(*piece)})}\n\n"
            except HTTPException as error:
                yield f"data: {json.dumps(described(error.status_code, error.detail))}\n\n"
            if body.stream_options.get("include_usage"):
                yield f"data: {json.dumps({**head, 'choices': [], **usage()})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    # Idle connections stay longer than clients keep theirs: none is closed while a request is on its way.
    options, waits = options_of(), {"timeout_keep_alive": 75, "timeout_graceful_shutdown": 30}
    uvicorn.run(app_of(options), host=options.host, port=options.port, **waits)
