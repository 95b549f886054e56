"""A server in OpenAI's form: one frozen language model, and a folder of adapters whose requests share its batches.

    python examples/serve.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapters three-prompts

Every sub-folder that save_pretrained wrote is a model of this server; docs/serving.md says the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field
from serving.engine import Engine
from serving.entities import entities
from starlette.exceptions import HTTPException

KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


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

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


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


def described(status: int, message: str) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def app_of(options: argparse.Namespace) -> FastAPI:
    """The server as an ASGI application; `app.state.engine` has the model."""
    if not options.adapters.is_dir():
        raise SystemExit(f"--adapters must be a folder, which may be empty; got {options.adapters}")
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
        read = await engine.read(body.model, body.texts, request, "SEQ_CLS")
        scores = [dict(zip(job.served.labels, job.served.scores(logits).tolist(), strict=True)) for job, logits in read]
        best = [max(one, key=one.get) for one in scores]
        data = [{"label": b, "score": one[b], "scores": one} for b, one in zip(best, scores, strict=True)]
        return {"object": "list", "model": body.model, "data": data}

    @app.post("/v1/tag")
    async def tag(body: Read, request: Request) -> dict[str, Any]:
        read = await engine.read(body.model, body.texts, request, "TOKEN_CLS")
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
