"""transformers' manager of continuous batching, with an adapter for each request."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import RequestStatus

from ptv2_fast.adapter import Adapter
from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.backbone.view import in_eval, view_of
from ptv2_fast.forward.paged import run_paged
from ptv2_fast.forward.row_prompts import new_account
from ptv2_fast.model import PTuningV2Model
from ptv2_fast.prompts.encoder import PromptEncoder
from ptv2_fast.prompts.kept_bank import KeptBank
from ptv2_fast.prompts.source import PromptSource
from ptv2_fast.task_models.bound_requests import (
    CHILD,
    BoundRequest,
    BoundRequests,
    check_pages,
    check_sequences,
    names_of_requests,
    new_tokens,
)
from ptv2_fast.task_models.read_requests import noted, noting_states
from ptv2_fast.task_models.shared_blocks import SharedBlocks


class KeptManager:
    """Where a model keeps the manager that its next session goes on with; a copy of the model has none."""

    def __init__(self) -> None:
        self.manager: AdapterBatchingManager | None = None

    def __reduce__(self) -> tuple[type[KeptManager], tuple[()]]:
        return KeptManager, ()


class _Router(OutputRouter):
    """Gives results their form, and notes which requests have their final one."""

    def __init__(self, requests: BoundRequests) -> None:
        super().__init__()
        self._requests = requests

    def deliver(self, output: Any) -> None:
        super().deliver(self._noted(output))

    def deliver_batch(self, outputs: list[Any]) -> None:
        super().deliver_batch([self._noted(output) for output in outputs])

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """As transformers' own; what was to be forked of a request fails with it."""
        for child in range(state.num_children):
            forked = copy.copy(state)
            forked.request_id, forked.num_children = f"{state.request_id}{CHILD}{child}", 0
            super().fail_and_deliver(forked, error)
        super().fail_and_deliver(state, error)

    def _noted(self, output: Any) -> Any:
        request = self._requests.get(output.request_id)
        if output.is_finished():
            self._requests.finished(output.request_id)
        return output if request is None or request.reading is None else request.reading.output(output)


class AdapterBatchingManager(ContinuousBatchingManager):
    """transformers' manager whose requests each have an adapter of one model; see `init_continuous_batching` there.

    A request of an adapter with a head of its own, or of one that gives states, generates nothing: its result is a
    `HeadOutput`, and comes when the last part of its text has been read.

    An adapter that is added while others run is there for the next request. What is written to an adapter's
    parameters in place is read from the next step on. Who deletes an adapter fails the requests that have it, those
    alone, with the reason as their error; another one of that name serves requests that are added after it. A request
    that outgrows all pages fails alone too, with the tokens that it has.

    Example:
        ```python
        from transformers import ContinuousBatchingConfig, LlamaConfig, LlamaForCausalLM

        from ptv2_fast import PTuningV2Config, get_ptv2_model

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100))
        model = get_ptv2_model(base, PTuningV2Config("CAUSAL_LM"), "writer")
        pages = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
        with model.continuous_batching_context_manager(continuous_batching_config=pages) as manager:
            request = manager.add_request([5, 6, 7], max_new_tokens=4, adapter_name="writer")
            output = manager.get_result(request, timeout=60)
        assert len(output.generated_tokens) == 4
        ```
    """

    def __init__(
        self, model: PTuningV2Model, kept: KeptManager, generation_config: Any, config: Any, workload_hints: Any
    ) -> None:
        self._adapters_of, self._kept = model, kept
        self._bound = BoundRequests()
        base = model._follow_backbone()

        def source_of(encoder: PromptEncoder) -> PromptSource:
            return PromptSource(in_eval(encoder), base.backbone, base.family, base.hooked)

        self._bank = KeptBank(source_of, base.sizes.num_layers)

        def forward(original: Callable[..., Any], **inputs: Any) -> Any:
            return self._step(lambda **given: run_paged(base, original, **given), inputs)

        view: Any = view_of(noting_states(in_eval(base.hooked.whole(base.model)), base.family), forward=forward)
        super().__init__(view, generation_config, config, workload_hints)
        if self.distributed_helper.tp_size > 1:
            raise ValueError("continuous batching must run in one process with adapters on; the base is sharded")
        self.output_router = _Router(self._bound)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """The view's attention is ours."""

    def _create_batch_processor(self) -> Any:
        """As transformers' own, whose blocks are shared within an adapter alone and whose requests must have theirs."""
        known, processor = self.batch_processor, super()._create_batch_processor()
        if processor is not known:
            self._watch(processor)
        return processor

    def _watch(self, processor: Any) -> None:
        # A text whose blocks are all there but for its last token would be forked in a step without any.
        forks = self.num_return_sequences > 1
        SharedBlocks(lambda name: None if forks else self._bound[name].shared).install(processor.cache)
        # What is cancelled is cleared between taking requests and scheduling them.
        scheduler, offloading = processor.scheduler, processor.offloading_manager
        clear, offload = scheduler.clear_cancelled_requests, offloading.offload_requests

        def clear_lost() -> Any:
            self._fail_lost(scheduler)
            cleared = clear()
            for state in cleared:
                if state.status != RequestStatus.FAILED:  # whose result is out
                    self._bound.finished(state.request_id, 1 + state.num_children)
            return cleared

        scheduler.clear_cancelled_requests = clear_lost
        offloading.offload_requests = lambda: offload() or self._fail_outgrown(scheduler, offloading)

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """As transformers' own; what is kept for the next session is kept by the model."""
        super().stop(block, timeout, keep_for_next_session, hard_stop)
        if keep_for_next_session:
            self._kept.manager = self

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        adapter_name: str | None = None,
        task: str | None = None,
        **logit_processor_kwargs: Any,
    ) -> str | None:
        """Add a request; as transformers' own, and with an adapter.

        Args:
            input_ids: one or more ids.
            max_new_tokens: where neither this nor the generation configuration says it, a text whose positions end
                somewhere ends there.
            adapter_name: the request's adapter; `"__base__"` for none. None means the one that is active now.
            task: the head that reads the text, where the adapter has several. What is said of tokens is not looked at
                where a head reads.

        Returns:
            The request's id; None where the manager takes no more requests.

        Raises:
            ValueError: an unknown adapter or head, ids that are no text of the model, more tokens than it has positions
                or the pages have places, or an id that another request has. Nothing is queued then.
        """
        request = self.bind(input_ids, adapter_name, max_new_tokens, task)
        if request_id is None:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        self._bound.add(request_id, request, self.num_return_sequences)
        added = None
        try:
            added = super().add_request(
                input_ids,
                request_id,
                request.max_new_tokens,
                streaming,
                record_timestamps,
                eos_token_id,
                **logit_processor_kwargs,
            )
        finally:
            if added is None:
                self._bound.finished(request_id, self.num_return_sequences)
        return added

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        *,
        adapter_names: Sequence[str | None] | None = None,
        **logit_processor_kwargs: Any,
    ) -> list[str]:
        """`add_request` of each of `inputs`, in their order, with the adapter that is named for it.

        Raises:
            ValueError: as `add_request`, or not as many names as inputs. Nothing is queued then.
        """
        names = names_of_requests(adapter_names, len(inputs))
        for input_ids, name in zip(inputs, names, strict=True):
            self.bind(input_ids, name, max_new_tokens)
        added = [
            self.add_request(
                input_ids,
                max_new_tokens=max_new_tokens,
                streaming=streaming,
                record_timestamps=record_timestamps,
                adapter_name=name,
                **logit_processor_kwargs,
            )
            for input_ids, name in zip(inputs, names, strict=True)
        ]
        return [request_id for request_id in added if request_id is not None]

    def bind(
        self,
        input_ids: Sequence[int],
        adapter_name: str | None,
        max_new_tokens: int | None = None,
        task: str | None = None,
    ) -> BoundRequest:
        """What a request would have if it was added now.

        Raises:
            ValueError: as `add_request`.
        """
        most = new_tokens(self.generation_config, max_new_tokens)
        request = BoundRequest.of(self._adapters_of, input_ids, adapter_name, most, task)
        check_pages(self._adapters_of, self.continuous_batching_config, input_ids)
        check_sequences(self.num_return_sequences, request, input_ids)
        return request

    def _fail_lost(self, scheduler: Any) -> None:
        """Fail the requests whose adapter is not there any more."""
        if not any(map(self._is_lost, self._bound.all())):
            return
        for state in [*scheduler.active_requests.values(), *scheduler.waiting_requests.values()]:
            request = self._bound[state.request_id]
            if self._is_lost(request):
                error = ValueError(f"adapter {request.name!r} was deleted while the request waited or ran")
                scheduler.set_request_cancellation(state.request_id)
                self.output_router.fail_and_deliver(state, error)

    def _fail_outgrown(self, scheduler: Any, offloading: Any) -> bool:
        """Fail the request that has no place in the pages though no other one holds any, where that is so.

        transformers would end them all.
        """
        active, waiting = scheduler.active_requests, scheduler.waiting_requests
        if len(active) == 1 and scheduler.starved_requests:
            state = scheduler.starved_requests[0][0]
        elif not active and waiting:
            state = waiting[scheduler.waiting_requests_order[0]]
        else:
            return False
        config, count = self.continuous_batching_config, len(state.initial_tokens) + len(state.generated_tokens)
        error = ValueError(
            f"input_ids and the tokens that follow must fit into {config.num_blocks} blocks of {config.page_size} "
            f"tokens; got {count}"
        )
        scheduler.set_request_cancellation(state.request_id)
        self.output_router.fail_and_deliver(state, error)
        for cleared in scheduler.clear_cancelled_requests():
            offloading.free_request_cpu_cache(cleared)
        scheduler.block_new_requests = False
        return True

    def _is_lost(self, request: BoundRequest) -> bool:
        return request.adapter is not self._adapters_of.adapters._modules.get(request.name)

    def _step(self, run: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """A forward of the model for the requests of the step, in the order of its rows."""
        processor: Any = self.batch_processor
        batch = processor.inputs_and_outputs.requests_in_batch
        rows = [self._bound[row.state.request_id] for row in batch]
        states: list[Tensor] = []
        if any(row.reading is not None for row in rows):
            inputs = {**inputs, "ptv2_states": states}
        output = run(
            inputs=inputs, prompts=lambda device: self._prompts(rows, device), offsets=[r.offset for r in rows]
        )
        if "ptv2_states" in inputs:
            parts = noted(states)[0].split([row.query_length for row in batch])
            for request, row, part in zip(rows, batch, parts, strict=True):
                if request.reading is not None:
                    request.reading.take(row.state.position_offset - row.query_length, part, row.has_new_token)
        return output

    def _prompts(self, rows: Sequence[BoundRequest], device: torch.device) -> PromptBatch:
        active = self._adapters_of.adapters._modules.get(self._adapters_of.active_adapter)
        backend = active.config.backend if isinstance(active, Adapter) else "auto"
        in_use = {request.encoder for request in self._bound.all()}
        layers, entries = self._bank.of([row.encoder for row in rows], in_use, backend)
        index = None if entries is None else torch.tensor(entries, device=device)
        return PromptBatch(layers, index, backend=backend, asked=new_account())
