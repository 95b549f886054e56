"""Continuous batching of a causal language model, with an adapter for each request."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import transformers
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

from ptv2_fast.model import PTuningV2Model
from ptv2_fast.task_models.batching_manager import AdapterBatchingManager, KeptManager
from ptv2_fast.task_models.bound_requests import (
    BoundRequest,
    check_pages,
    check_sequences,
    names_of_requests,
    new_tokens,
)

# The first version that reads pages by a function of one form for every kind of layer (`PagedAttentionCache.update`).
SINCE = (5, 19)
SERVED = tuple(map(int, transformers.__version__.split(".")[:2])) >= SINCE
# What would run another forward than the one that knows which request a row is.
_UNSERVED = (
    "use_cuda_graph", "use_async_batching", "varlen_compile_config", "decode_compile_config", "default_compile_level",
)  # fmt: skip


class ContinuousBatching(PTuningV2Model):
    """What a causal language model answers in the place of its base where many requests share their batches."""

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> Any:
        """transformers' manager of continuous batching, whose requests each have an adapter of this model.

        A request's text is in transformers' pages; its prompt is outside of them, made once for all requests that have
        it. `manager.add_request(ids, adapter_name="a")` and `manager.add_requests(inputs, adapter_names=[...])` choose
        adapters; everything else is transformers' own: streaming, cancelling, handlers, `num_return_sequences`, greedy
        tokens and sampling. What becomes of requests whose adapter is written to, deleted or replaced says
        `AdapterBatchingManager`. It runs in eval mode, as transformers' does; the base stays as it is.

        Requests with a common beginning share its blocks where they have the same adapter, and nowhere else. CUDA
        graphs, asynchronous batching and torch.compile are off: they would run a step whose rows nobody could tell
        apart.

        Within `disable_adapter` it is the bare model's own.

        Args:
            generation_config: None means the model's.
            continuous_batching_config: None means transformers' default.
            workload_hints: as transformers' own.

        Raises:
            ValueError: transformers is older than 5.19, the configuration asks for what is off, or transformers does
                not serve the base.
        """
        if self._disabled:
            return self.base_model.init_continuous_batching(
                generation_config, continuous_batching_config, workload_hints
            )
        _check_served()
        kept = self._kept_manager()
        if kept.manager is not None:
            return kept.manager
        generation_config = copy.deepcopy(generation_config or self.generation_config)
        if generation_config.eos_token_id is None:
            generation_config.eos_token_id = -1  # transformers' own word for none
        config = _config(continuous_batching_config, generation_config)
        return AdapterBatchingManager(self, kept, generation_config, config, workload_hints)

    def destroy_cached_continuous_batching_manager(self) -> None:
        """End the manager that `persistent_manager=True` has kept."""
        if self._disabled:
            self.base_model.destroy_cached_continuous_batching_manager()
            return
        kept = self._kept_manager()
        if kept.manager is not None:
            kept.manager.destroy()
            kept.manager = None

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """Within this context the manager runs that `init_continuous_batching` gives; transformers' own arguments.

        Raises:
            ValueError: as `init_continuous_batching`.
        """
        if self._disabled:
            bare: AbstractContextManager[Any] = self.base_model.continuous_batching_context_manager(*args, **kwargs)
            return bare
        _check_served()
        this: Any = self
        return ContinuousMixin.continuous_batching_context_manager(this, *args, **kwargs)

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Generate from many texts of any lengths by continuous batching; transformers' own arguments and outputs.

        Args:
            inputs: the ids of each text.
            generation_config: None means the model's.
            adapter_names: one for each text, `"__base__"` for none; None is the active adapter.

        Returns:
            A `GenerationOutput` for each request's id, in the order of `inputs`; a `HeadOutput` where the adapter has a
            head, or gives states.

        Raises:
            ValueError: as `init_continuous_batching` and `AdapterBatchingManager.add_request`, before anything runs.
        """
        if self._disabled:
            bare: dict[str, Any] = self.base_model.generate_batch(
                inputs, generation_config, continuous_batching_config, **kwargs
            )
            return bare
        _check_served()
        # transformers would log what adding requests raises, and go on without them.
        names = names_of_requests(adapter_names, len(inputs))
        most = new_tokens(generation_config or self.generation_config, kwargs.get("max_new_tokens"))
        for input_ids, name in zip(inputs, names, strict=True):
            request = BoundRequest.of(self, input_ids, name, most)
            check_sequences((generation_config or self.generation_config).num_return_sequences or 1, request, input_ids)
            if continuous_batching_config is not None:
                check_pages(self, continuous_batching_config, input_ids)
        this: Any = _WithNames(self, names)
        return ContinuousMixin.generate_batch(this, inputs, generation_config, continuous_batching_config, **kwargs)

    def _kept_manager(self) -> KeptManager:
        kept: KeptManager = self.__dict__.setdefault("_manager", KeptManager())
        return kept


class _WithNames:
    """What transformers' `generate_batch` asks of a model and of its manager; the requests' adapters are named."""

    def __init__(self, model: ContinuousBatching, names: Sequence[str | None], manager: Any = None) -> None:
        self.generation_config = model.generation_config
        self._model, self._names, self._manager = model, names, manager

    @contextmanager
    def continuous_batching_context_manager(self, **kwargs: Any) -> Iterator[_WithNames]:
        with self._model.continuous_batching_context_manager(**kwargs) as manager:
            yield _WithNames(self._model, self._names, manager)

    def add_requests(self, **kwargs: Any) -> list[str]:
        added: list[str] = self._manager.add_requests(adapter_names=self._names, **kwargs)
        return added

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def _check_served() -> None:
    """Refuse versions of transformers whose pages cannot be read beside prompts."""
    if not SERVED:
        raise ValueError(
            f"continuous batching with adapters must run on transformers {'.'.join(map(str, SINCE))} or newer; got "
            f"{transformers.__version__}. generate serves batches with prompts, one adapter a row"
        )


def _config(given: ContinuousBatchingConfig | None, generation_config: GenerationConfig) -> ContinuousBatchingConfig:
    """A copy of a configuration, with what cannot be served off.

    Raises:
        ValueError: it is asked for.
    """
    own = getattr(generation_config, "continuous_batching_config", None)
    config = copy.deepcopy(given or own or ContinuousBatchingConfig())
    for name in _UNSERVED:
        value = getattr(config, name)
        if any(value) if isinstance(value, tuple) else value:
            raise ValueError(f"{name} must be off in continuous_batching_config with adapters on; got {value!r}")
    config.use_cuda_graph = config.use_async_batching = False
    return config
