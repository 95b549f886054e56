"""The model of examples/serve.py: a folder of adapters, and requests that share the batches of one worker."""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from fastapi import Request
from starlette.exceptions import HTTPException

from ptv2_fast import PTuningV2Config, get_ptv2_model

BASE = "base"  # the name of the model without an adapter
ROUTES = {"CAUSAL_LM": "/v1/completions", "SEQ_CLS": "/v1/classify", "TOKEN_CLS": "/v1/tag"}
SCORES = {"regression": torch.Tensor.float, "multi_label_classification": torch.sigmoid}
SECONDS = ("0.01", "0.03", "0.1", "0.3", "1", "3", "10", "30", "+Inf")


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

    async def read(
        self, model: str, texts: list[str], request: Request, task: str
    ) -> list[tuple[SimpleNamespace, torch.Tensor]]:
        """What an adapter's head gives for each text."""
        jobs: list[SimpleNamespace] = []
        try:
            for text in texts:
                jobs.append(self.submit(model, task, text))
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
