"""Every switch of the training step on and off: the same losses, gradients and outputs."""

from __future__ import annotations

import logging
from dataclasses import fields

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from batches import padded, text_rows
from ptv2_fast.backbone.view import TRACES_VIEWS
from ptv2_fast.step.options import StepOptions, plan_step
from ptv2_fast.step.unpad import Packing
from tiny_models import CHANGES_LOGITS, DECODERS, FAMILIES, INJECTIONS, LABELS, RELATIVE, tiny_model, tiny_prompts
from tolerances import assert_equal

OFF = StepOptions(**{field.name: False for field in fields(StepOptions)})
CPU = torch.device("cpu")
# A shallow prompt on an encoder is rows of the batch: there is nothing to unpad around it. Nor is there where a token's
# slot is its position: such rows run padded.
UNPADDABLE = [
    pytest.param(family, injection, id=f"{family}-{injection}")
    for family in FAMILIES
    for injection in INJECTIONS
    if family in DECODERS or (injection != "shallow" and family not in RELATIVE)
]


def _step(model, options: StepOptions, inputs: dict):
    """Outputs, and the gradients of everything that trains."""
    model.step_options = options
    model.zero_grad()
    output = model(**inputs)
    loss = output.loss if output.loss is not None else output.last_hidden_state.square().mean()
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return output, loss.detach(), grads


def _compare(model, options: StepOptions, inputs: dict):
    plain, loss, grads = _step(model, OFF, inputs)
    saved, saved_loss, saved_grads = _step(model, options, inputs)
    assert_equal(saved_loss, loss, "loss")
    assert len(saved_grads) == len(grads) > 0
    for saved_grad, grad in zip(saved_grads, grads, strict=True):
        assert_equal(saved_grad, grad, "gradient")
    return plain, saved


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize(("family", "injection"), UNPADDABLE)
def test_unpadded_states_are_the_padded_ones_and_zero_at_padding(family, injection, side):
    model = tiny_model(family, injection).train()
    batch = padded(text_rows(), side)
    model.step_options = OFF
    expected = model(**batch.inputs, output_hidden_states=True)
    model.step_options = StepOptions(unpad=True)
    got = model(**batch.inputs, output_hidden_states=True)
    real = batch.inputs["attention_mask"].bool()
    for wanted, found in zip(
        (expected.last_hidden_state, *expected.hidden_states),
        (got.last_hidden_state, *got.hidden_states),
        strict=True,
    ):
        assert_equal(found[real], wanted[real], side)
        assert torch.all(found[~real] == 0)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unpadded_steps_give_the_losses_and_gradients_of_padded_ones(family, task):
    model = tiny_model(family, "deep", task, base_changes={"classifier_dropout": 0.0}).train()
    batch = padded(text_rows(), "right")
    mask = batch.inputs["attention_mask"]
    labels = torch.randint(0, 3, (mask.shape[0],) if task == "SEQ_CLS" else mask.shape)
    if task == "TOKEN_CLS":
        labels = labels.masked_fill(mask == 0, -100)
    _compare(model, StepOptions(unpad=True), {**batch.inputs, "labels": labels})


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_labelled_rows_give_the_loss_and_gradients_of_all_logits(family, unpad):
    model = tiny_model(family, "deep", "CAUSAL_LM").train()
    batch = padded(text_rows(), "left")
    # The first real token of a left-padded row would be predicted from padding.
    inside = batch.inputs["attention_mask"].cumsum(-1) > 1
    labels = batch.inputs["input_ids"].masked_fill(~inside, -100)
    plain, saved = _compare(
        model, StepOptions(unpad=unpad, labelled_rows_loss=True), {**batch.inputs, "labels": labels}
    )
    # A softcap stands between Gemma's head and its logits, a scale between Cohere's: those are computed as ever.
    assert plain.logits is not None and (saved.logits is not None) == (family in CHANGES_LOGITS)
    count = {**batch.inputs, "labels": labels, "num_items_in_batch": torch.tensor(50)}
    _compare(model, StepOptions(unpad=unpad, labelled_rows_loss=True), count)


def test_a_batch_without_labels_has_loss_zero():
    model = tiny_model("llama", "deep", "CAUSAL_LM").train()
    model.step_options = StepOptions(labelled_rows_loss=True)
    ids = torch.randint(3, 30, (2, 5))
    assert model(input_ids=ids, labels=torch.full_like(ids, -100)).loss == 0


def test_evaluation_keeps_its_logits():
    model = tiny_model("llama", "deep", "CAUSAL_LM").eval()
    model.step_options = StepOptions(labelled_rows_loss=True)
    ids = torch.randint(3, 30, (2, 5))
    assert model(input_ids=ids, labels=ids).logits is not None


def test_checkpointed_accumulated_autocast_steps_are_the_plain_ones():
    model = tiny_model("bert", "deep", "TOKEN_CLS").train()
    batch = padded(text_rows(), "right")
    labels = torch.zeros_like(batch.inputs["input_ids"]).masked_fill(batch.inputs["attention_mask"] == 0, -100)
    inputs = {**batch.inputs, "labels": labels}
    _, loss, grads = _step(model, OFF, inputs)
    model.activation_checkpointing_enable()
    _, again, recomputed = _step(model, StepOptions(unpad=True), inputs)
    assert_equal(again, loss, "checkpointed loss")
    for a, b in zip(recomputed, grads, strict=True):
        assert_equal(a, b, "checkpointed gradient")
    with torch.autocast("cpu", torch.bfloat16):
        _, low, _ = _step(model, StepOptions(unpad=True), inputs)
    assert abs(float(low - loss)) < 0.05 * abs(float(loss))


def test_a_mixed_batch_is_unpadded_with_each_rows_own_prompt():
    model = tiny_model("llama", "deep")
    model.add_adapter("other", tiny_prompts("prefix", length=3))
    batch = padded(text_rows(), "left")
    names = ["default", "other", "__base__", "other"][: batch.inputs["input_ids"].shape[0]]
    model.step_options = OFF
    expected = model(**batch.inputs, adapter_names=names).last_hidden_state
    model.step_options = StepOptions(unpad=True)
    got = model(**batch.inputs, adapter_names=names).last_hidden_state
    real = batch.inputs["attention_mask"].bool()
    assert_equal(got[real], expected[real], "mixed")


def test_no_layer_sees_padding():
    """With unpadding on, no tensor inside the step has B x N rows of hidden states but the outermost ones."""
    model = tiny_model("bert", "deep").train()
    batch = padded(text_rows(), "right")
    rows, tokens = batch.inputs["input_ids"].shape

    class Padded(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[:2] == (rows, tokens) and out.dim() == 3:
                self.found += 1
            return out

    counts = {}
    for on in (False, True):
        model.step_options = StepOptions(unpad=on)
        with Padded() as mode:
            model(**batch.inputs)
        counts[on] = mode.found
    assert counts[True] <= 2 < counts[False]


def test_below_the_first_prompted_layer_nothing_has_a_gradient():
    model = tiny_model("bert", "deep", layers=[-1]).train()
    output = model(**padded(text_rows(), "right").inputs, output_hidden_states=True)
    assert [state.requires_grad for state in output.hidden_states] == [False, False, True]


# What is read at padding: labels there, the first token of rows that have their padding in front, a row without text.
@pytest.mark.parametrize("task", ["TOKEN_CLS", "FEATURE_EXTRACTION", "SEQ_CLS", "QUESTION_ANS"])
def test_how_much_padding_there_is_changes_no_loss_and_no_output(task):
    model = tiny_model("bert", "deep", task).train()
    batch = padded(text_rows(), "left" if task == "FEATURE_EXTRACTION" else "right").inputs
    if task == "SEQ_CLS":
        batch["attention_mask"][1] = 0
    labels = {
        "TOKEN_CLS": {"labels": torch.ones_like(batch["input_ids"])},
        "SEQ_CLS": {"labels": torch.arange(3)},
        "QUESTION_ANS": {"start_positions": torch.zeros(3).long(), "end_positions": torch.ones(3).long()},
    }.get(task, {})
    outputs = []
    for options in (StepOptions(), StepOptions(unpad=True)):  # so little padding is dropped only if asked for
        model.step_options = options
        outputs.append(model(**batch, **labels, output_hidden_states=True))
    for name, wanted in outputs[1].items():
        several = isinstance(wanted, tuple)
        pairs = zip(outputs[0][name], wanted, strict=True) if several else [(outputs[0][name], wanted)]
        for found, expected in pairs:
            assert_equal(found, expected, name)


def test_packing_goes_there_and_back():
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    packing = Packing.of(mask)
    values = torch.arange(9.0).view(3, 3, 1)
    assert packing.pack(values).flatten().tolist() == [1, 2, 6, 8]
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 4] and packing.longest == 2
    assert torch.equal(packing.unpack(packing.pack(values)), values * mask[..., None])
    assert Packing.of_padded(torch.ones(2, 3)) is None and Packing.of_padded(torch.zeros(2, 3)) is None
    assert torch.equal(Packing.of_padded(mask).index, packing.index)


def test_the_plan_says_what_is_on_and_why(caplog):
    assert plan_step(StepOptions(), training=True, device=torch.device("cuda"), backend="auto").unpad
    assert not plan_step(StepOptions(), training=False, device=torch.device("cuda"), backend="auto").unpad
    assert not plan_step(StepOptions(), training=True, device=torch.device("cuda"), backend="torch").unpad
    assert plan_step(StepOptions(), training=True, device=CPU, backend="torch").unpad
    assert plan_step(StepOptions(unpad=True), training=False, device=CPU, backend="torch").unpad
    few, many = torch.ones(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.long)
    few[1, -2:], many[1, -20:] = 0, 0
    on_cpu = plan_step(StepOptions(), training=True, device=CPU, backend="torch")
    assert [on_cpu.unpads(mask, width) for mask in (few, many) for width in (32, 384)] == [False, False, False, True]
    assert plan_step(StepOptions(unpad=True), training=True, device=CPU, backend="torch").unpads(few, 32)
    assert not plan_step(StepOptions(unpad=False), training=True, device=CPU, backend="torch").unpads(many, 384)
    with pytest.raises(ValueError, match="unpad must be True, False or None; got 'yes'"):
        StepOptions(unpad="yes")
    model = tiny_model("bert", "deep").train()
    with caplog.at_level(logging.INFO, "ptv2_fast"):
        model(input_ids=torch.randint(3, 30, (2, 5)))
        model(input_ids=torch.randint(3, 30, (2, 5)))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "training step: unpad on (training on the CPU or with triton); "
        "labelled_rows_loss off (not training on CUDA); fused_projections off (not training on CUDA); "
        "last_rows on (training); compile_layers off (unless asked for); cuda_graphs off (not training on CUDA); "
        "float8 off (unless asked for)"
    ]


@pytest.mark.parametrize("where", ["config", "call"])
def test_a_loss_beside_the_cross_entropy_is_kept(where):
    changes = {"output_router_logits": True, "router_aux_loss_coef": 0.5} if where == "config" else {}
    model = tiny_model("mixtral", "deep", "CAUSAL_LM", base_changes=changes).train()
    ids = torch.randint(3, 30, (2, 5))
    inputs = {"input_ids": ids, "labels": ids, **({} if where == "config" else {"output_router_logits": True})}
    _, saved = _compare(model, StepOptions(labelled_rows_loss=True), inputs)
    assert saved.aux_loss is not None


@pytest.mark.parametrize("options", [OFF, StepOptions(unpad=True, labelled_rows_loss=True)], ids=["off", "on"])
@pytest.mark.parametrize("family", DECODERS)
def test_labels_count_alike_on_every_side_of_the_padding(family, options):
    model = tiny_model(family, "deep", "CAUSAL_LM").train()
    model.step_options = options
    losses = []
    for side in ("left", "right"):
        batch = padded(text_rows(), side)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        losses.append(model(**batch.inputs, labels=labels).loss)
    assert_equal(losses[0], losses[1], family)


def test_a_loss_of_another_kind_is_not_replaced():
    ids = torch.randint(3, 30, (2, 5))
    on = StepOptions(labelled_rows_loss=True)
    model = tiny_model("llama", "deep", "CAUSAL_LM").train()
    hook = model.base_model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    _compare(model, on, {"input_ids": ids, "labels": ids})
    hook.remove()
    model.base_model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    _compare(model, on, {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("where", ["call", "config"])
@pytest.mark.parametrize(("family", "task"), [("bert", "TOKEN_CLS"), ("llama", "CAUSAL_LM"), ("llama", "SEQ_CLS")])
def test_tuples_are_given_to_who_asks_for_them(family, task, where):
    heads = {"own": 3} if task == "SEQ_CLS" else None
    model = tiny_model(family, "deep", task, heads=heads).train()
    batch = padded(text_rows(), "right")
    labels = torch.zeros(3 if task == "SEQ_CLS" else (3, 9), dtype=torch.long)
    inputs = {**batch.inputs, "labels": labels}
    if where == "config" and task == "CAUSAL_LM":
        pytest.skip("transformers' own model fails with config.return_dict=False")
    for options in (OFF, StepOptions(unpad=True, labelled_rows_loss=True)):
        model.step_options = options
        expected = model(**inputs).loss
        if where == "call":
            output = model(**inputs, return_dict=False)
        else:
            model.base_model.config.return_dict = False
            output = model(**inputs)
            model.base_model.config.return_dict = True
        assert isinstance(output, tuple)
        assert_equal(output[0], expected, "loss")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_batch_of_padding_alone_runs(family):
    model = tiny_model(family, "deep").train()
    model.step_options = StepOptions(unpad=True)
    ids = torch.ones(2, 4, dtype=torch.long)
    assert model(input_ids=ids, attention_mask=torch.zeros_like(ids)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(("family", "task"), [("bert", "TOKEN_CLS"), ("llama", "CAUSAL_LM")])
def test_inside_the_compiler_sizes_do_not_depend_on_data(family, task):
    model = tiny_model(family, "deep", task, base_changes={"num_hidden_layers": 1}).train()
    batch = padded(text_rows(), "right")
    labels = (batch.input_ids % LABELS).masked_fill(batch.attention_mask == 0, -100)
    inputs = {**batch.inputs, "labels": labels}
    # transformers installs its hooks, behind a lock, when a model first runs.
    model.step_options = OFF
    expected = model(**inputs).loss
    model.step_options = StepOptions(**{field.name: True for field in fields(StepOptions)})  # float8 is off there
    assert_equal(torch.compile(model, backend="eager", fullgraph=TRACES_VIEWS)(**inputs).loss, expected, "loss")
