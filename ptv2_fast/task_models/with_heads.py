"""What the tasks with trained heads share: running the head that an adapter has, and the outputs they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_outputs
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ptv2_fast.adapter import BASE_ROW, Adapter
from ptv2_fast.config import ROW_TASKS
from ptv2_fast.inputs.features import features_read, input_size, reads_text
from ptv2_fast.inputs.pooling import tokens_read
from ptv2_fast.inputs.right_padding import HIDDEN_STATES, change_states, reorder_tokens, to_right_padding
from ptv2_fast.inputs.text import check_inputs
from ptv2_fast.losses import LOSSES, base_targets, chosen_loss, span_loss
from ptv2_fast.step.host_batch import SPAN, spans
from ptv2_fast.task_models.groups import flat_rows, names_of_rows, with_groups
from ptv2_fast.task_models.labelled_config import labelled
from ptv2_fast.task_models.mixed_rows import MixedOutput, results_of_rows
from ptv2_fast.task_models.packed_heads import PackedHeads
from ptv2_fast.task_types import SINGLE_LABEL, TASKS


class PTuningV2ModelWithHeads(PackedHeads):
    """What the tasks with trained heads share: running the head that an adapter has."""

    @property
    def config(self) -> Any:
        """The base's configuration; with the active adapter's label names where they are its own.

        What is set on it is set on the base's, and label names in the adapter. A pipeline reads label names from here,
        and what a head solves.
        """
        config, adapter = self.base_model.config, self.adapters[self.active_adapter]
        if len(adapter.heads) != 1 and adapter.labels is None:
            return config
        problem: str | None = _problem_of(adapter)
        if problem == SINGLE_LABEL and (len(adapter.heads) != 1 or getattr(config, "problem_type", None) is None):
            problem = None
        return labelled(config, adapter.label_names, adapter.rename_labels, problem)

    @config.setter
    def config(self, config: Any) -> None:
        self.base_model.config = config

    @property
    def num_labels(self) -> int:
        """How many classes `config` names."""
        return int(self.config.num_labels)

    def _own_heads(self) -> Mapping[str, nn.Module]:
        return dict(self.adapters[self.active_adapter].base_heads.items())

    def _run_task(
        self,
        inputs: dict[str, Any],
        adapter_names: Sequence[str] | None,
        task: str | None,
        targets: dict[str, Tensor | None],
    ) -> Any:
        """The task's output with logits, and a loss where `targets` (labels, or start and end) are given."""
        return_dict = inputs.pop("return_dict", None)
        names = list(dict.fromkeys(adapter_names)) if adapter_names else [self.active_adapter]
        given = {name: target for name, target in targets.items() if target is not None}
        adapters = [self.adapters[n] for n in names if n in self.adapters]
        captured = self._captured_task(inputs, adapter_names, task, given)
        if captured is not None:
            return self._as_asked(captured, return_dict)
        if task is not None and not any(len(a.heads) for a in adapters):
            raise ValueError(f"task must be None where no adapter has heads of its own; got {task!r}")
        groups = None
        if self._reads_groups(adapters, task):
            inputs, groups = flat_rows(inputs)
            adapter_names = names_of_rows(adapter_names, groups)
        if self._disabled or not adapters or not any(len(a.heads) for a in adapters):
            output = self._run_base_head(inputs, adapter_names, adapters, given, groups)
        else:
            output = self._run_own_heads(inputs, adapter_names, names, task, given, groups)
        return self._as_asked(output, return_dict)

    def _reads_groups(self, adapters: Sequence[Adapter], task: str | None) -> bool:
        """Whether examples are several rows, by the heads that run.

        Raises:
            ValueError: by some of them only.
        """
        if self._disabled or not adapters:
            first = adapters[0] if adapters else self.adapters[self.active_adapter]
            named = len(first.heads) == 1 if task is None else task in first.heads
            return TASKS[(first.head(task).config if named else first.config).task_type].in_groups
        kinds = {(a.head(task).config if len(a.heads) else a.config).task_type for a in adapters}
        grouped = {kind for kind in kinds if TASKS[kind].in_groups}
        if grouped and len(kinds) > 1:
            raise ValueError(
                f"adapter_names must not mix {' and '.join(sorted(grouped))}, whose examples are several rows, with "
                f"other tasks; got {', '.join(sorted(kinds - grouped))}"
            )
        return bool(grouped)

    def _captured_task(
        self,
        inputs: dict[str, Any],
        adapter_names: Sequence[str] | None,
        task: str | None,
        targets: Mapping[str, Tensor],
    ) -> Any:
        """The task's output from a captured pass; None where it has to be computed as any other."""
        if not targets or not self._may_capture():
            return None
        adapter = self.adapters[self.active_adapter]
        beside: dict[str, Any] = {} if task is None or list(adapter.heads) == [task] else {"task": task}
        packed = self.packed_task()
        of_span = packed.gives == "span" and set(targets) == set(SPAN)
        if not of_span:
            beside.update((name, target) for name, target in targets.items() if name != "labels")
        labels = spans([targets[name] for name in SPAN]) if of_span else targets.get("labels")
        captured = self._captured({**inputs, **beside}, labels, adapter_names)
        if captured is None:
            return None
        loss, (logits,) = captured
        if packed.gives == "span":
            start, end = logits.unbind(-1)
            return _output_class(packed.task_type)(loss, start_logits=start, end_logits=end)
        if self._family.causal and packed.gives == "row" and not adapter.heads:
            return SequenceClassifierOutputWithPast(loss, logits)  # as classifiers of decoders give it
        return _output_class(packed.task_type)(loss, logits=logits)

    def _run_base_head(
        self,
        inputs: dict[str, Any],
        adapter_names: Sequence[str] | None,
        adapters: list[Adapter],
        targets: Mapping[str, Tensor],
        groups: tuple[int, int] | None = None,
    ) -> Any:
        """The base's own forward, with the adapter's copy of the base's head in its place.

        Args:
            groups: (B, C) where the inputs are B C rows of B examples.
        """
        task_type = self.adapters[self.active_adapter].config.task_type
        target = self.base_model
        if adapters and not self._disabled:
            if len(adapters) > 1:
                raise ValueError(
                    "adapter_names must name one adapter where each has its own copy of the base's head; configure "
                    f"heads={{...}} on the backbone to mix them in one batch; got {len(adapters)} adapters"
                )
            target = adapters[0].base_with_head(target)
        chosen = chosen_loss(target)
        if groups is not None:
            # The base's own loss knows no label that is left out: it is computed of the logits, as our heads' is.
            own_targets, targets = targets, {}
            target = target if target is self.backbone else with_groups(target, groups)
        else:
            targets = base_targets(target, task_type, input_size(self._family, inputs), targets)
        read = back = None
        if adapters and adapters[0].config.task_type in ROW_TASKS and self._family.reads_first:
            if not self._disabled and reads_text(self._family):
                check_inputs(inputs.get("input_ids"), inputs.get("inputs_embeds"), inputs.get("attention_mask"), 0)
                inputs, back = to_right_padding(inputs)
            read = self._read(inputs, "first")
        output = self.run(target, {**inputs, **targets}, adapter_names, read=read)
        if back is not None:
            change_states(output, HIDDEN_STATES, lambda states: reorder_tokens(states, back))
        if groups is not None and own_targets:
            if not hasattr(output, "logits"):
                raise ValueError(f"{', '.join(own_targets)} must be None where no head runs")
            return _task_output(task_type, output.logits, own_targets, output, chosen=chosen)
        return output

    def _run_own_heads(
        self,
        inputs: dict[str, Any],
        adapter_names: Sequence[str] | None,
        names: Sequence[str],
        task: str | None,
        targets: Mapping[str, Tensor],
        groups: tuple[int, int] | None = None,
    ) -> Any:
        """The states of the text with prompts, then our head of each row's adapter; `groups` as for the base's head."""
        head = self.adapters[names[0]].head(task) if len(names) == 1 else None
        read = None
        if head is not None:
            read = self._read(inputs, head.pooling) if head.config.task_type in ROW_TASKS else None
        output = self._run_states(inputs, adapter_names, read)
        hidden = output.last_hidden_state
        mask = inputs.get("attention_mask")
        mask = mask if mask is not None and mask.dim() == 2 and reads_text(self._family) else None
        if head is not None:
            logits = head(hidden, mask, read if reads_text(self._family) else None)
            logits = logits if groups is None else logits.view(groups)
            chosen = chosen_loss(self.base_model)
            return _task_output(head.config.task_type, logits, targets, output, head.config.problem_type, chosen)
        if BASE_ROW in names:
            raise ValueError(f"adapter_names must not hold {BASE_ROW!r} with heads: such a row has no head")
        if targets:
            raise ValueError(
                f"{', '.join(targets)} must be None with several adapters in one batch: train one at a time"
            )
        each = results_of_rows(self, self._row_names(adapter_names, hidden.shape[0]), hidden, mask, task)
        logits_of_rows = [row for row in each if row is not None]  # all of them: none writes text
        kinds = {self.adapters[name].head(task).config.task_type for name in names}
        if groups is not None:
            return _task_output(kinds.pop(), torch.stack(logits_of_rows).view(groups), targets, output)
        if len(kinds) > 1 or len({row.shape for row in logits_of_rows}) > 1:
            # Rows of different kinds or label sets have no common tensor: one tensor of logits each.
            return MixedOutput(logits=tuple(logits_of_rows), hidden_states=output.hidden_states)
        return _task_output(kinds.pop(), torch.stack(logits_of_rows), targets, output)

    def _run_without_head(self, inputs: dict[str, Any], adapter_names: Sequence[str] | None) -> Any:
        """The backbone's output, or of an encoder-decoder its encoder's where adapters have heads, which read that.

        A row of the bare base is as one of the active adapter.

        Raises:
            ValueError: rows of an encoder-decoder have adapters with heads and without.
        """
        named = {self.active_adapter if name == BASE_ROW else name for name in adapter_names or (BASE_ROW,)}
        with_heads = {len(self.adapters[name].heads) > 0 for name in named & set(self.adapters)}
        if self._disabled or True not in with_heads:
            return self.run(self.backbone, inputs, adapter_names)
        if len(with_heads) > 1 and self._frozen.sizes.decoder_layers:
            raise ValueError(
                "adapter_names must not mix adapters with heads, for which the encoder runs alone, with others on an "
                f"encoder-decoder; got {sorted(named)}"
            )
        return self._run_states(inputs, adapter_names)

    def _read(self, inputs: dict[str, Any], pooling: str) -> Tensor | None:
        """Which tokens of the flattened (B, N) a head reads that pools this way; None where it reads them all."""
        if reads_text(self._family):
            return tokens_read(inputs, pooling)
        return features_read(self._family, inputs, self.backbone, pooling)


def _problem_of(adapter: Adapter) -> str:
    """What an adapter's single head solves."""
    problems = {head.config.problem_type for head in adapter.heads.values()}
    return problems.pop() if len(problems) == 1 else SINGLE_LABEL


def _task_output(
    task_type: str,
    logits: Any,
    targets: Mapping[str, Tensor],
    output: Any,
    problem_type: str = SINGLE_LABEL,
    chosen: Callable[..., Any] | None = None,
) -> Any:
    """The output class of a task, with its loss where there are targets: its own, or the one that somebody chose."""
    is_span = TASKS[task_type].gives == "span"
    expected = {"start_positions", "end_positions"} if is_span else {"labels"}
    if targets and set(targets) != expected:
        raise ValueError(
            f"{' and '.join(sorted(expected))} must be given for a {task_type} head; got {', '.join(targets)}"
        )
    states = {"hidden_states": output.hidden_states}
    loss = None
    if is_span:
        start, end = logits.unbind(-1)
        if targets:
            loss = chosen(start, end, **targets) if chosen else span_loss(logits, **targets)
        return _output_class(task_type)(loss, start_logits=start, end_logits=end, **states)
    if targets:
        loss = chosen(logits=logits, **targets) if chosen else LOSSES[problem_type](logits, targets["labels"])
    return _output_class(task_type)(loss, logits=logits, **states)


def _output_class(task_type: str) -> type[Any]:
    """The class of a task's outputs, transformers' own."""
    found: type[Any] = getattr(modeling_outputs, TASKS[task_type].output_class)
    return found
