"""Captured steps, by a stand-in for capture: what they leave behind, what may change between them, what may fail."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.stand_in import StandIn, captured_on_cpu
from graph_steps import WIDE, batches_of, compare_steps, model_of, optimizer_of, plain_losses
from ptv2_fast.step.graph_runner import WARM_UP_STEPS, GraphRunner
from ptv2_fast.step.options import StepOptions
from tiny_models import tiny_prompts
from tolerances import assert_equal

# The first step makes the gradients, the others warm up; the next one captures.
BEFORE_CAPTURE = 1 + WARM_UP_STEPS
# A pass and an update.
REPLAYS = 2


def _replayed(counts, steps, passes=1):
    """Whether every step that could be replayed was, and nothing was captured twice."""
    return (counts.captures, counts.replays) == (REPLAYS, (steps - BEFORE_CAPTURE) * (passes + 1))


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
def test_a_step_leaves_its_gradient_behind(max_grad_norm, counts):
    compare_steps("llama text", 8, max_grad_norm=max_grad_norm)
    assert _replayed(counts, 8)


def test_accumulated_steps_leave_their_gradient_behind(counts):
    runner = compare_steps("bert tags, base head", 7, accumulate=3, max_grad_norm=1e-3)
    assert runner.captured == 1 and counts.replays > 6


def test_accumulated_batches_may_be_another_number_each_time(counts):
    batches = batches_of("CAUSAL_LM", count=12)
    model, plain = model_of("llama text"), model_of("llama text")
    optimizers = [optimizer_of(m) for m in (model, plain)]
    runner, eager = (GraphRunner(m, o, buckets=WIDE) for m, o in zip((model, plain), optimizers, strict=True))
    eager._failure = "it is the eager one"
    for start, end in ((0, 1), (1, 2), (2, 4), (4, 5), (5, 8), (8, 10), (10, 11)):
        group = batches[start:end]
        assert_equal(runner.step(*group), eager.step(*group), f"loss from {start}")


def test_an_eager_step_leaves_its_gradient_behind():
    compare_steps("llama text", 3, max_grad_norm=1e-3)


def _forget_gradients(step, model, optimizer):
    optimizer.zero_grad(set_to_none=True)


def _forget_all_gradients(step, model, optimizer):
    model.zero_grad()


def _replace_gradients(step, model, optimizer):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 7.0)


@pytest.mark.parametrize("between", [_forget_gradients, _forget_all_gradients, _replace_gradients])
def test_gradients_that_were_taken_away_are_put_back(between, counts, said):
    compare_steps("bert rows, first token", 10, between=between)
    assert _replayed(counts, 10)
    assert len(said("put back")) == 1 and not said("dropped")


def test_a_second_optimizer_may_step_in_between(counts):
    seconds = {}

    def between(step, model, optimizer):
        if id(model) not in seconds:
            seconds[id(model)] = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        second = seconds[id(model)]
        second.zero_grad()
        model(**batches_of("CAUSAL_LM", count=1, seed=3)[0]).loss.backward()
        second.step()
        second.zero_grad()

    compare_steps("llama text", 9, between=between)
    assert _replayed(counts, 9)


def test_a_loaded_state_drops_the_update_alone(counts, said):
    def between(step, model, optimizer):
        if step == 6:
            # Twice: the first one's tensors are freed, and what is new may be where they were.
            for _ in range(2):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    runner = compare_steps("llama text", 12, between=between)
    assert said("dropped") == ["graph runner: the captured update is dropped: the optimizer's state was replaced"]
    assert runner.captured == 1 and counts.captures == 3
    assert counts.replays == (12 - BEFORE_CAPTURE) * REPLAYS - WARM_UP_STEPS


def test_a_state_dict_comes_back_with_its_rate(counts):
    def between(step, model, optimizer):
        if step == 5:
            saved = copy.deepcopy(optimizer.state_dict())
            for group in optimizer.param_groups:
                group["lr"] = 0.5
            optimizer.load_state_dict(saved)

    compare_steps("llama text", 9, between=between)


@pytest.mark.parametrize("kind", ["lambda", "cycle", "written"])
def test_rates_may_change_at_every_step(kind, counts, said):
    schedulers = {}

    def between(step, model, optimizer):
        if kind == "written":
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            return
        if step == 1:
            schedulers[id(optimizer)] = (
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.7**n)
                if kind == "lambda"
                else torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=40)
            )
        if step > 1:
            schedulers[id(optimizer)].step()

    compare_steps("llama text", 10, between=between)
    # One cycle turns betas too: that update is never captured, the passes are.
    expected = 10 - BEFORE_CAPTURE if kind == "cycle" else (10 - BEFORE_CAPTURE) * REPLAYS
    assert counts.replays == expected and not said("dropped")


def test_changed_settings_drop_the_update_alone(counts, said):
    def between(step, model, optimizer):
        if step == 5:
            optimizer.param_groups[0]["weight_decay"] = 0.5

    runner = compare_steps("llama text", 10, between=between)
    assert said("dropped") == ["graph runner: the captured update is dropped: the optimizer's settings changed"]
    assert runner.captured == 1 and counts.captures == 3


def _other_switches(model, optimizer):
    model.step_options = StepOptions(last_rows=False)


def _moved_weights(model, optimizer):
    weight = next(p for p in model.backbone.parameters())
    weight.data = weight.data.clone()


def _replaced_weight(model, optimizer):
    norm = next(m for m in model.backbone.modules() if type(m) is torch.nn.LayerNorm)
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 1.5, requires_grad=False)


def _replaced_module(model, optimizer):
    layer = next(m for m in model.backbone.modules() if type(m) is torch.nn.Linear)
    parent, name = next((m, n) for m in model.backbone.modules() for n, child in m._modules.items() if child is layer)
    other = torch.nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
    with torch.no_grad():
        other.weight.copy_(layer.weight * 1.5)
        other.bias.copy_(layer.bias)
    setattr(parent, name, other)


def _moved_buffer(model, optimizer):
    module, name = next((m, n) for m in model.backbone.modules() for n in m._buffers)
    module._buffers[name] = module._buffers[name].clone()


def _frozen_head(model, optimizer):
    for head in model.adapters["default"].heads.values():
        head.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_other_switches, "the model's switches changed"),
        (_moved_weights, "weights were moved, cast or replaced"),
        (_replaced_weight, "weights were moved, cast or replaced"),
        (_replaced_module, "a module was replaced"),
        (_moved_buffer, "buffers were moved, cast or replaced"),
        (_frozen_head, "the optimizer trains other parameters"),
    ],
)
def test_what_would_be_wrong_is_captured_anew(change, why, counts, said):
    def between(step, model, optimizer):
        if step == 6:
            change(model, optimizer)

    runner = compare_steps("bert rows, first token", 12, between=between)
    assert said("dropped") == [f"graph runner: captured steps are dropped: {why}"]
    assert runner.captured == 1 and counts.captures == 2 * REPLAYS


def test_the_reason_for_a_switch_does_not_matter(counts, said):
    def between(step, model, optimizer):
        model.step_options = StepOptions(last_rows=None if step % 2 else True)

    compare_steps("llama text", 8, between=between)
    assert _replayed(counts, 8) and not said("dropped")


def test_another_options_in_between_do_not_matter(counts, said):
    def between(step, model, optimizer):
        model.step_options = StepOptions(unpad=False, last_rows=False)
        model.step_plan()
        model.step_options = StepOptions()

    compare_steps("llama text", 8, between=between)
    assert _replayed(counts, 8) and not said("dropped")


def _two_adapters(model):
    """An optimizer over the active adapter and an idle one."""
    torch.manual_seed(8)
    model.add_adapter("other", tiny_prompts("deep", "CAUSAL_LM"))
    model.set_adapter("default")
    for adapter in model.adapters.values():
        adapter.requires_grad_(True)
    return torch.optim.AdamW(model.adapters.parameters(), lr=1e-2)


def test_adapters_of_one_optimizer_take_turns(counts, said):
    def between(step, model, optimizer):
        if step in (5, 11):
            model.set_adapter("other" if step == 5 else "default")
            for adapter in model.adapters.values():
                adapter.requires_grad_(True)

    compare_steps("llama text", 16, between=between, make=_two_adapters)
    assert said("dropped") == ["graph runner: captured steps are dropped: another adapter is active"] * 2
    assert counts.captures == 3 * REPLAYS


def test_a_stale_gradient_of_an_idle_adapter_moves_nothing(counts):
    def between(step, model, optimizer):
        for parameter in model.adapters["other"].parameters():
            parameter.grad = torch.ones_like(parameter)

    runner = compare_steps("llama text", 8, between=between, make=_two_adapters)
    assert _replayed(counts, 8)
    torch.manual_seed(8)
    fresh = model_of("llama text")
    _two_adapters(fresh)
    for ours, theirs in zip(
        runner._model.adapters["other"].parameters(), fresh.adapters["other"].parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_batch_that_cannot_be_packed_may_come_between(counts, said):
    packable = batches_of("CAUSAL_LM", count=10)

    def batches(step):
        batch = packable[step]
        if step != 6:
            return batch
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}

    compare_steps("llama text", 10, batches=batches)
    # Step 6 replays nothing, and what it did to gradients is nobody's fault.
    assert counts.captures == REPLAYS and counts.replays == (10 - BEFORE_CAPTURE - 1) * REPLAYS
    assert not said("put back") and not said("dropped") and len(said("batch has position_ids")) == 1


def test_a_parameter_of_nobody_is_written_where_it_was(counts):
    """What trains beside the optimizer's parameters gets its gradient at one address too."""

    def make(model):
        return torch.optim.AdamW(model.adapters["default"].encoder.parameters(), lr=1e-2)

    def between(step, model, optimizer):
        # Up to here it adds up, as in any loop whose optimizer does not have the parameter.
        if step > BEFORE_CAPTURE + 1:
            model.zero_grad()

    compare_steps("bert rows, first token", 8, make=make, between=between)
    assert _replayed(counts, 8)


class Recorded(StandIn):
    """As on CUDA a replay computes the gradients that its capture recorded, whoever trains by then."""

    model = None

    def __call__(self, call):
        parameters = list(self.model.parameters())
        recorded = [p.requires_grad for p in parameters]
        replay = super().__call__(call)

        def as_recorded():
            now = [p.requires_grad for p in parameters]
            for parameter, flag in zip(parameters, recorded, strict=True):
                parameter.requires_grad_(flag)
            try:
                return replay()
            finally:
                for parameter, flag in zip(parameters, now, strict=True):
                    parameter.requires_grad_(flag)

        return as_recorded


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("trains", [True, False])
def test_a_parameter_of_nobody_is_frozen_or_freed(trains, accumulate, said):
    """A head of which another optimizer takes care begins to train, or ends to."""
    recorded = type("Recorded", (Recorded,), {})

    def make(model):
        # The first one is the runner's.
        recorded.model = recorded.model or model
        return torch.optim.AdamW(model.adapters["default"].encoder.parameters(), lr=1e-2)

    def between(step, model, optimizer):
        head = model.adapters["default"].heads["own"]
        head.zero_grad()
        head.requires_grad_(trains == (step >= 6))

    with captured_on_cpu(recorded) as counts:
        compare_steps("bert rows, first token", 12, make=make, between=between, accumulate=accumulate)
    assert said("dropped") == ["graph runner: captured steps are dropped: other parameters train"]
    assert counts.captures == 2 * REPLAYS


def test_who_else_trains_is_known_before_a_pass_that_is_no_replay(counts, said):
    """The step is taken anew where it was not: such a pass would have added to the gradient of the head before."""
    drawn = batches_of("SEQ_CLS", count=10)
    large = {name: torch.cat([value] * 9) for name, value in drawn[6].items()}

    def make(model):
        return torch.optim.AdamW(model.adapters["default"].encoder.parameters(), lr=1e-2)

    def between(step, model, optimizer):
        head = model.adapters["default"].heads["own"]
        head.zero_grad()
        head.requires_grad_(step >= 6)

    def batches(step):
        return large if step == 6 else drawn[step]

    compare_steps("bert rows, first token", 8, make=make, between=between, batches=batches)
    assert said("dropped") == ["graph runner: captured steps are dropped: other parameters train"]


class Refusal(StandIn):
    """A device that refuses one capture, having run none of it."""

    at, error = 1, RuntimeError("operation not permitted when stream is capturing\nand more")

    def __call__(self, call):
        if self.counts.captures + 1 == self.at:
            self.counts.captures += 1
            raise self.error
        return super().__call__(call)


ERRORS = [
    RuntimeError("operation not permitted when stream is capturing\nand more"),
    torch.OutOfMemoryError("CUDA out of memory"),
    AssertionError(),
    ValueError("\n"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_capture_that_fails_leaves_eager_steps(at, error, said):
    refusal = type("Refusal", (Refusal,), {"at": at, "error": error})
    # Each step has a batch of either size: the first pass, the second pass and the update are captured.
    batches = batches_of("TOKEN_CLS", count=24)
    batches[1::2] = [{name: torch.cat([value] * 3) for name, value in batch.items()} for batch in batches[1::2]]
    model = model_of("roberta tags, own head")
    with captured_on_cpu(refusal) as counts:
        runner = GraphRunner(model, optimizer_of(model), buckets=WIDE)
        losses = torch.stack([runner.step(*batches[i : i + 2]) for i in range(0, 24, 2)])
    assert_equal(losses, plain_losses("roberta tags, own head", batches, accumulate=2), "losses")
    lines = said("could not be captured")
    assert len([line for line in lines if "steps run eagerly" in line]) == 1, lines
    assert type(error).__name__ in lines[0] and "\n" not in lines[0]
    # Nothing is captured after that, nothing replayed in later steps, and what there was is dropped.
    assert counts.captures == at and runner.captured == 0


def test_a_user_who_interrupts_a_capture_is_heard():
    with captured_on_cpu(type("Refusal", (Refusal,), {"error": KeyboardInterrupt()})):
        with pytest.raises(KeyboardInterrupt):
            compare_steps("llama text", 6)


def test_a_runner_says_once_that_and_why_it_is_eager(said):
    model = model_of("llama text")
    model.step_options = StepOptions(cuda_graphs=False)
    batch = batches_of("CAUSAL_LM", count=1)[0]
    with captured_on_cpu() as counts:
        runner = GraphRunner(model, optimizer_of(model))
        for _ in range(3):
            runner.step(batch)
    assert len(said("steps run eagerly: step_options.cuda_graphs is off")) == 1
    assert counts.captures == counts.warm_ups == 0


@pytest.mark.parametrize("change", ["dropout", "scaling"])
def test_numbers_that_modules_compute_with(change, counts, said):
    batch = batches_of("CAUSAL_LM", count=1)[0]
    model = model_of("llama text")
    runner = GraphRunner(model, optimizer_of(model))
    for _ in range(BEFORE_CAPTURE + 1):
        runner.step(batch)
    assert counts.captures == REPLAYS
    if change == "dropout":
        model.adapters["default"].encoder.dropout = 0.5
    else:
        model.backbone.layers[0].self_attn.scaling *= 2
    replays = counts.replays
    runner.step(batch)
    assert counts.replays == replays and len(said("modules train, drop or scale otherwise")) == 1
