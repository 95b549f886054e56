"""What may change between captured forwards of a model, what may fail, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

from benchmarks.stand_in import StandIn, captured_on_cpu
from captured_forwards import (
    OPTIONS,
    UNTIL_CAPTURED,
    assert_same_gradients,
    assert_same_steps,
    captured,
    forward_loss,
    fresh,
    gradients,
    packed_loss,
    training,
    warmed,
)
from graph_steps import batches_of
from ptv2_fast.step.forward_batch import in_one_copy
from ptv2_fast.step.options import StepOptions
from tiny_models import tiny_model, tiny_prompts
from tolerances import assert_same_bits

TEXT, ROWS = "llama text", "bert rows, first token"


def _same_as_an_eager_pass(model, batch) -> None:
    """Fail unless a forward and its backward give what an eager pass gives."""
    found = forward_loss(model, batch)
    found.backward()
    ours = gradients(model)
    model.zero_grad()
    expected = packed_loss(model, batch)
    expected.backward()
    assert_same_bits(found.detach(), expected.detach(), "loss")
    assert_same_gradients(ours, gradients(model))
    model.zero_grad()


def _with_another(case):
    model = fresh(case)
    torch.manual_seed(8)
    model.add_adapter("other", tiny_prompts("prefix", "CAUSAL_LM"))
    return model


def test_adapters_take_turns_and_keep_their_captures(counts, said):
    def between(step, model):
        model.set_adapter(("default", "other")[step % 2])

    batches = batches_of("CAUSAL_LM", count=10)
    found = training(_with_another(TEXT), forward_loss, batches, accumulate=1, between=between)
    assert_same_steps(found, training(_with_another(TEXT), packed_loss, batches, accumulate=1, between=between))
    assert counts.captures == 2 and counts.replays == 10 - 2 * (UNTIL_CAPTURED - 1) and not said("dropped")


def test_an_adapter_that_was_replaced(counts, said):
    model, batch = warmed(TEXT)
    model.add_adapter("other", tiny_prompts("prefix", "CAUSAL_LM"))
    model.delete_adapter("default")
    model.add_adapter("default", tiny_prompts("deep", "CAUSAL_LM"))
    model.set_adapter("default")
    _same_as_an_eager_pass(model, batch)
    assert counts.replays == 1 and len(said("dropped")) == 1


def test_weights_of_the_base_change_in_place(counts, said):
    model, batch = warmed(TEXT)
    before = forward_loss(model, batch).item()
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter.mul_(1.5)
    _same_as_an_eager_pass(model, batch)
    assert counts.replays == 3 and not said("dropped") and forward_loss(model, batch).item() != before


def _replace_weights(model):
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight * 1.5, requires_grad=False)


def _replace_prompts(model):
    encoder = model.adapters["default"].encoder
    # The same memory, another parameter.
    encoder.prompts = torch.nn.Parameter(encoder.prompts.data)


def _replace_a_layer(model):
    layers = model.backbone.layers
    layers[0] = copy.deepcopy(layers[0])


CHANGES = {
    "weights": (_replace_weights, "weights were moved, cast or replaced"),
    "prompts": (_replace_prompts, "a trained parameter was replaced"),
    "a layer": (_replace_a_layer, "a module was replaced"),
    "modes": (lambda model: model.base_model.eval(), "modules train, drop or scale otherwise, or have other settings"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_captured_is_dropped(change, counts, said):
    model, batch = warmed(TEXT)
    CHANGES[change][0](model)
    for _ in range(UNTIL_CAPTURED):
        _same_as_an_eager_pass(model, batch)
    assert said("dropped") == [f"training step: captured steps are dropped: {CHANGES[change][1]}"]
    assert counts.captures == 2 and counts.replays == 2


def test_a_model_that_moves_gives_its_captures_back(counts):
    model, batch = warmed(TEXT)
    model.double()
    assert captured(model) == 0
    for _ in range(UNTIL_CAPTURED):
        _same_as_an_eager_pass(model, batch)
    assert captured(model) == 1


def test_a_loss_outlives_what_was_captured(counts):
    model, batch = warmed(TEXT)
    loss = forward_loss(model, batch)
    packed_loss(model, batch).backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_adapter("default")
    _replace_a_layer(model)
    forward_loss(model, batch)
    loss.backward()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_captures_for_itself(copied, counts):
    model, batch = warmed(ROWS)
    other = copied(model)
    assert captured(other) == 0
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    for _ in range(UNTIL_CAPTURED):
        _same_as_an_eager_pass(other, batch)
    assert (captured(model), captured(other), counts.captures) == (1, 1, 2)
    _same_as_an_eager_pass(model, batch)


def test_nothing_here_keeps_a_model_alive(counts):
    model = fresh(ROWS)
    batch = batches_of("SEQ_CLS", count=1)[0]
    for _ in range(UNTIL_CAPTURED - 1):
        forward_loss(model, batch).backward()
    gone = [weakref.ref(one) for one in (model, model.adapters, model.base_model, next(model.base_model.parameters()))]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [one() for one in gone] == [None] * 4
    finally:
        gc.enable()


def test_an_error_in_between_leaves_the_next_step_as_it_was(counts):
    model, batch = warmed(ROWS)
    wrong = {**batch, "labels": batch["labels"] + 90}
    for bad in (wrong, {**batch, "labels": batch["labels"].float()}, {**batch, "labels": batch["labels"][:1]}):
        with pytest.raises(ValueError, match="labels must"):
            forward_loss(model, bad)
        _same_as_an_eager_pass(model, batch)
    assert captured(model) == 1


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nand more"), AssertionError()])
def test_a_capture_that_fails_leaves_forwards_as_they_were(error, said):
    class Refusal(StandIn):
        def __call__(self, call):
            self.counts.captures += 1
            raise error

    batches = batches_of("SEQ_CLS", count=8)
    with captured_on_cpu(Refusal) as counts:
        found = list(training(fresh(ROWS), forward_loss, batches, accumulate=1))
    assert counts.captures == 1 and counts.replays == 0
    (line,) = said("could not be captured")
    assert line.startswith("training step: not captured: a pass could not be captured: ") and "\n" not in line
    assert len(found) == 8 and all(step.losses.isfinite().all() for step in found)


def test_hooks_are_run(counts, said):
    model, batch = warmed(TEXT)
    seen = []
    handle = model.backbone.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    forward_loss(model, batch)
    handle.remove()
    (prompts,) = [p for p in model.parameters() if p.requires_grad]
    handle = prompts.register_hook(lambda gradient: seen.append("gradient"))
    forward_loss(model, batch).backward()
    handle.remove()
    assert seen == ["layer", "gradient"] and counts.replays == 1 and len(said("hooks")) == 2
    # Hooks that run when a gradient arrives are autograd's own business.
    prompts.register_post_accumulate_grad_hook(lambda parameter: seen.append("arrived"))
    forward_loss(model, batch).backward()
    assert seen[2:] == ["arrived"] and counts.replays == 2


def test_a_checkpoint_around_the_model(counts):
    model, batch = warmed(TEXT)
    ours = {}
    for name in ("plain", "checkpointed"):
        if name == "plain":
            loss = model(**batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)).loss
        else:
            loss = torch.utils.checkpoint.checkpoint(lambda: forward_loss(model, batch), use_reentrant=False)
        loss.backward()
        ours[name] = gradients(model)
        model.zero_grad()
    assert counts.replays == 1
    for name, gradient in ours["plain"].items():
        torch.testing.assert_close(ours["checkpointed"][name], gradient)


def _in_threads(*calls) -> None:
    failed = []

    def run(call):
        try:
            call()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def test_two_models_in_two_threads(counts):
    batches = batches_of("CAUSAL_LM", count=8)
    expected = list(training(fresh(TEXT), packed_loss, batches))[-1:]
    # Made one after the other: both draw from the one generator.
    models, found = [fresh(TEXT), fresh(TEXT)], []
    _in_threads(*(lambda m=m: found.append(list(training(m, forward_loss, batches))) for m in models))
    for steps in found:
        assert_same_steps(steps[-1:], expected)


def test_one_model_in_two_threads(counts):
    model, batch = warmed(TEXT)
    (prompts,) = [p for p in model.parameters() if p.requires_grad]
    plain = model(**batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)).loss
    expected = torch.autograd.grad(plain, prompts)[0]

    def work():
        for _ in range(10):
            (found,) = torch.autograd.grad(forward_loss(model, batch), prompts)
            torch.testing.assert_close(found, expected)

    _in_threads(work, work)


REASONS = {
    "positions": (("llama", "deep", "CAUSAL_LM", {}), {"position_ids": torch.arange(5).expand(2, -1)}, "position_ids"),
    "hidden states": (("llama", "deep", "CAUSAL_LM", {}), {"output_hidden_states": True}, "output_hidden_states"),
    "names": (("llama", "deep", "CAUSAL_LM", {}), {"adapter_names": ["default"] * 2}, "adapter_names"),
    "four dimensions": (
        ("llama", "deep", "CAUSAL_LM", {}), {"attention_mask": torch.ones(2, 1, 5, 5).tril().bool()}, "attention_mask"
    ),
    "labels at padding": (
        ("bert", "deep", "TOKEN_CLS", {"heads": {"own": 3}}), {"labels": torch.zeros(2, 5).long()}, "at padding"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_captured_runs_as_before_and_says_why(name, counts, said):
    (family, injection, task, config), extra, reason = REASONS[name]
    model = tiny_model(family, injection, task, **config).train()
    model.step_options = OPTIONS
    batch = {**batches_of(task, count=1)[0], **extra}
    losses = []
    for options in (OPTIONS, StepOptions(labelled_rows_loss=True, cuda_graphs=False)):
        model.step_options = options
        for _ in range(2):
            torch.manual_seed(0)
            losses.append(model(**batch).loss.detach())
    for loss in losses[1:]:
        assert_same_bits(loss, losses[0], name)
    assert counts.warm_ups == 0
    (line,) = said("not captured")
    assert reason in line


def _base_trains(model):
    next(model.base_model.parameters()).requires_grad_(True)


def _checkpointing(model):
    model.gradient_checkpointing_enable()


def _own_loss(model):
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0


def _own_forward(model):
    layer = model.backbone.encoder.layer[0]
    layer.forward = type(layer).forward.__get__(layer)


def _own_module(model):
    class Noise(torch.nn.Linear):
        pass

    old = model.backbone.encoder.layer[0].output.dense
    model.backbone.encoder.layer[0].output.dense = Noise(old.in_features, old.out_features).requires_grad_(False)


def _all_states(model):
    model.base_model.config.output_hidden_states = True


def _layerdrop(model):
    model.base_model.config.layerdrop = 0.1


def _half(model):
    model.base_model.half()


MODELS = {
    _layerdrop: "layerdrop",
    _half: "float16 needs a scaled loss",
    _base_trains: "parameters of the base train",
    _checkpointing: "gradient checkpointing",
    _own_loss: "the loss is another one",
    _own_forward: "another forward than its class",
    _own_module: "the base has a Noise of ",
    _all_states: "asks for hidden states",
}


@pytest.mark.parametrize("change", MODELS, ids=lambda change: change.__name__)
def test_models_that_are_not_captured(change, counts, said):
    model = fresh("bert tags, base head")
    change(model)
    for batch in batches_of("TOKEN_CLS", count=2):
        forward_loss(model, batch)
    assert counts.warm_ups == 0
    (line,) = said("not captured")
    assert MODELS[change] in line


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_surroundings_that_are_not_captured(counts, said):
    model, batch = warmed(TEXT)
    with torch.autograd.detect_anomaly(check_nan=False):
        forward_loss(model, batch)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    forward_loss(model, batch)
    handle.remove()
    assert counts.replays == 1 and len(said("not captured")) == 2


def test_what_lies_on_a_device_comes_in_one_copy():
    tensors = [torch.arange(6).view(2, 3), torch.tensor([[0.0, 0.5, 2.0]]), torch.tensor([True, False])]
    found = in_one_copy(tensors)
    assert [t.tolist() for t in found] == [[[0, 1, 2], [3, 4, 5]], [[0, 1, 1]], [1, 0]]
