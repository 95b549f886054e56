"""P_Tuning_Model is the tutorial's own, judged by its literal form: outputs, gradients, names, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from batches import padded, text_rows
from ptv2_fast.reference import deep_tutorial as literal
from ptv2_fast.reference.literal import literal_deep
from ptv2_fast.step.options import StepOptions
from ptv2_fast.tutorials import DeepPromptEncoder, P_Tuning_Model
from shape_audit import ShapeAudit
from tiny_models import HIDDEN, tiny_base
from tolerances import assert_differs, assert_equal, assert_same_bits

P, LABELS = 3, (2, 4)
# The literal class knows the first ones; the others' layers take more than states and a mask.
PLAIN = ("bert", "roberta", "electra", "albert", "distilbert")
OTHERS = ("modernbert", "mpnet", "deberta-v2")
SIDES = ("left", "right")


def _pair(family: str = "bert", dtype: torch.dtype = torch.float64, **changes):
    """The fast model and the literal one of the same weights and seed."""
    base = tiny_base(family, exact=dtype == torch.float64, **changes)
    made = []
    for kind, own in ((P_Tuning_Model, base), (literal.P_Tuning_Model, copy.deepcopy(base))):
        torch.manual_seed(1)
        made.append(kind(own, P, LABELS).to(dtype))
    return made


def _step(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of both tasks and of every real token, flat, and the gradients that one loss over them gives."""
    model.zero_grad()
    args = batch.input_ids, batch.attention_mask
    tokens = model.token_logits(*args, task_idx=1)[batch.attention_mask.bool()]
    logits = torch.cat([part.flatten() for part in (model(*args), model(*args, task_idx=1), tokens)])
    logits.sin().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _assert_alike(ours, theirs, batch, dtype=None) -> None:
    (logits, grads), (expected, expected_grads) = _step(ours, batch), _step(theirs, batch)
    assert_equal(logits, expected, "logits", dtype)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_equal(grad, expected_grads[name], name, dtype)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", PLAIN)
def test_logits_and_gradients_are_the_literal_forms(family, side):
    ours, theirs = _pair(family)
    for mode in (True, False):  # a training step leaves padding out
        _assert_alike(ours.train(mode), theirs.train(mode), padded(text_rows(), side))


def test_float32_agrees_too():
    ours, theirs = _pair(dtype=torch.float32)
    _assert_alike(ours, theirs, padded(text_rows(), "right"))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", OTHERS)
def test_every_other_encoder_is_served(family, side):
    model = P_Tuning_Model(tiny_base(family, exact=True), P, LABELS).double().train()
    batch = padded(text_rows(), side)
    embeddings = [prompt.weight for prompt in model.prompt_encoder.prompts]
    states = literal_deep(tiny_base(family, exact=True), torch.stack(embeddings), batch.input_ids, batch.attention_mask)
    real = batch.attention_mask.bool()
    expected = model.classification_heads[1](states[torch.arange(len(states)), real.long().argmax(1)])
    got = model(batch.input_ids, batch.attention_mask, 1)
    assert_equal(got, expected, "logits")
    tokens = model.token_logits(batch.input_ids, batch.attention_mask, 1)
    assert_equal(tokens[real], model.classification_heads[1](states[real]), "token logits")
    grads, expected_grads = (torch.autograd.grad(logits.sin().sum(), embeddings) for logits in (got, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_equal(grad, expected_grad, "gradient")


@pytest.mark.parametrize(("family", "side"), [("bert", "right"), ("distilbert", "left")])
def test_the_kernels_agree(family, side):
    # Heads of 16 are the smallest that they take; the interpreter takes its time over more layers and rows.
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    ours, theirs = _pair(family, torch.float32, **sizes)
    assert ours.backend == "auto"
    ours.backend = "triton"
    _assert_alike(ours, theirs, padded(text_rows(5, 2), side, width=6))


def test_a_seed_gives_the_tutorials_parameters_under_its_names_and_in_its_order():
    ours, theirs = _pair()
    for (name, own), (their_name, their_own) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == their_name and own.requires_grad == their_own.requires_grad
        assert_same_bits(own, their_own, name)
    for name in ("num_layers", "hidden_dim", "prompt_length"):
        assert getattr(ours, name) == getattr(theirs, name)
    own = {name for name in ours.state_dict() if not name.startswith("base_model.")}
    assert own == {
        *(f"prompt_encoder.prompts.{layer}.weight" for layer in (0, 1)),
        *(f"classification_heads.{task}.{part}" for task in (0, 1) for part in ("weight", "bias")),
    }


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_load_both_ways(assign):
    batch = padded(text_rows(), "right")
    for source, target in (_pair(), reversed(_pair())):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        _assert_alike(target, source, batch)


def test_a_folder_is_loaded_and_frozen_on_the_tutorials_device(tmp_path):
    tiny_base("bert").save_pretrained(tmp_path)
    for name in (tmp_path, str(tmp_path)):
        model = P_Tuning_Model(name, P, LABELS)
        assert not any(p.requires_grad for p in model.base_model.parameters())
        assert torch.device(model.device).type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert {str(p.device) for p in model.parameters()} == {model.device} == {model.prompt_encoder.device}
    batch = padded(text_rows(), "right")
    args = (batch.input_ids.to(model.device), batch.attention_mask.to(model.device))
    given = P_Tuning_Model(tiny_base("bert"), P, LABELS)
    given.load_state_dict(model.state_dict())
    assert_equal(model(*args).cpu(), given(batch.input_ids, batch.attention_mask))


def test_a_prompt_is_its_layers_embeddings():
    encoder = DeepPromptEncoder(2, HIDDEN, P, "cpu")
    assert encoder.device == "cpu" and encoder(1).shape == (P, HIDDEN)
    encoder(layer_idx=1).sum().backward()
    assert encoder.prompts[0].weight.grad is None and (encoder.prompts[1].weight.grad == 1).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_their_own(copied):
    model, _ = _pair()
    batch = padded(text_rows(), "left")
    model(batch.input_ids, batch.attention_mask)  # after a forward as well as before
    again = copied(model)
    _assert_alike(again, model, batch)
    expected = model(batch.input_ids, batch.attention_mask).detach()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert_same_bits(model(batch.input_ids, batch.attention_mask), expected, "the original")
    changed = again.eval()(batch.input_ids, batch.attention_mask)
    fresh = literal.P_Tuning_Model(tiny_base("bert", exact=True), P, LABELS).double().eval()
    fresh.load_state_dict(again.state_dict())
    assert_equal(changed, fresh(batch.input_ids, batch.attention_mask), "the copy")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_whole_model_may_be_narrow_and_so_may_the_base_alone(dtype):
    batch = padded(text_rows(), "right")
    args = batch.input_ids, batch.attention_mask
    model = P_Tuning_Model(tiny_base("bert"), P, LABELS)
    expected = model(*args).detach()
    model.base_model.to(dtype)
    assert_equal(model(*args), expected, "base", torch.bfloat16)
    assert model(*args).dtype == torch.float32
    model = model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} == {model(*args).dtype}
    assert_equal(model.token_logits(*args)[:, 0].float(), expected, "all", torch.bfloat16)


def test_two_models_share_a_base():
    base, batch = tiny_base("bert", exact=True), padded(text_rows(), "left")
    models = [P_Tuning_Model(base, length, LABELS).double() for length in (2, 5)]
    for model in (*models, *models):
        alone = literal.P_Tuning_Model(tiny_base("bert", exact=True), model.prompt_length, LABELS).double()
        alone.load_state_dict(model.state_dict())
        _assert_alike(model, alone, batch)


def test_prompts_that_were_saved_whole_are_set_and_the_base_is_not():
    model, other = _pair()[0], _pair()[0]
    batch = padded(text_rows(), "right")
    args = batch.input_ids, batch.attention_mask
    torch.nn.init.normal_(other.prompt_encoder.prompts[0].weight)
    model.prompt_encoder = pickle.loads(pickle.dumps(other.prompt_encoder))
    assert_equal(model(*args), other(*args))
    model(*args).sum().backward()
    assert model.prompt_encoder.prompts[0].weight.grad is not None
    model.classification_heads = torch.nn.ModuleList([torch.nn.Linear(HIDDEN, 7).double()])
    assert model(*args).shape == (3, 7)
    model.classification_heads[0] = torch.nn.Sequential(torch.nn.Dropout(0.0), model.classification_heads[0])
    assert model(*args).shape == (3, 7)
    for value in (DeepPromptEncoder(2, HIDDEN, P + 1, "cpu"), torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=r"prompt_encoder must be .*\(2, 3, 32\); got"):
            model.prompt_encoder = value
    with pytest.raises(ValueError, match="base_model must stay"):
        model.base_model = other.base_model


def test_whoever_moves_a_model_may_say_where_it_is():
    """The tutorial's `device` is an attribute that `.to(...)` does not follow, so its programs set it."""
    model = _pair()[0]
    for module in (model, model.prompt_encoder):
        module.device = "meta"
        assert module.device == "cpu", "its weights say where it is"


def test_train_and_eval_are_the_bases_too():
    base = tiny_base("bert", hidden_dropout_prob=0.5)
    model, batch = P_Tuning_Model(base, P, LABELS), padded(text_rows(), "right")
    args = batch.input_ids, batch.attention_mask
    # As it is loaded, the base is in eval mode and the rest is not.
    assert model.training and not base.training
    first = model(*args)
    assert_same_bits(model(*args), first)
    assert model.train() is model and base.training
    assert_differs(model(*args), model(*args))
    assert model.eval() is model and not base.training
    assert_equal(model(*args), first)


def test_no_tensor_has_prompts_and_text():
    """But keys and values in attention; P + N is no other size here."""
    batch, total = padded(text_rows(9, 4, 13), "left", width=13), 10 + 13
    hits = []
    for kind in (P_Tuning_Model, literal.P_Tuning_Model):
        model = kind(tiny_base("bert"), 10, LABELS)
        for mode in (True, False):
            audit = ShapeAudit(total, 3 * total, allowed=lambda shape: len(shape) == 4 and shape[1] in (1, 4))
            with audit:
                model.train(mode)(batch.input_ids, batch.attention_mask).sum().backward()
            hits.append(bool(audit.hits))
    assert hits == [False, False, True, True]


def test_a_training_step_leaves_out_padding_and_what_no_head_reads():
    model, batch = P_Tuning_Model(tiny_base("bert"), P, LABELS).train(), padded(text_rows(5, 2, 7), "right")
    model._prompted[0].step_options = StepOptions(unpad=True)  # on a CPU so little padding is dropped only if asked for
    rows = []
    for layer in model.base_model.encoder.layer:
        layer.intermediate.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].numel() // HIDDEN))
    model(batch.input_ids, batch.attention_mask)
    assert rows == [5 + 2 + 7, 3]
    rows.clear()
    model.token_logits(batch.input_ids, batch.attention_mask, 1)
    assert rows == [5 + 2 + 7] * 2


def test_masks_may_be_any_numbers_or_none():
    model, _ = _pair()
    batch = padded(text_rows(), "left")
    expected = model(batch.input_ids, batch.attention_mask)
    for mask in (batch.attention_mask.double(), batch.attention_mask.bool()):
        assert_same_bits(model(batch.input_ids, mask), expected)
    rows = torch.randint(2, 40, (2, 5))
    assert_equal(model(rows, None), model(rows, torch.ones(2, 5)))


BERT = tiny_base("bert")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: DeepPromptEncoder(0, 4, 3, "cpu"), "num_layers must be .* 0", id="layers"),
        pytest.param(lambda: P_Tuning_Model(BERT, 0, [2]), "prompt_length must be .*0", id="no-p"),
        pytest.param(lambda: P_Tuning_Model(BERT, 3, []), "num_labels_list .*none", id="no-task"),
        pytest.param(lambda: P_Tuning_Model(BERT, 3, [2, 0]), r"num_labels_list\[1\] .*0", id="no-label"),
        pytest.param(lambda: P_Tuning_Model(tiny_base("gpt2"), 3, [2]), "base_model_name .*GPT2Model", id="decoder"),
        pytest.param(lambda: P_Tuning_Model(BERT.encoder, 3, [2]), "base_model_name .*BertEncoder", id="part"),
    ],
)
def test_bad_arguments_are_refused_before_a_base_is_frozen(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert all(p.requires_grad for p in BERT.parameters())


def test_bad_inputs_are_refused():
    model, _ = _pair()
    ids = torch.ones(1, 2).long()
    with pytest.raises(ValueError, match=r"task_idx must be in 0\.\.1; got 2"):
        model(ids, None, task_idx=2)
    for call in (model, model.token_logits):
        with pytest.raises(ValueError, match=r"input_ids must be \(B, N\); got \(2,\)"):
            call(ids[0], None)
        for shape in ((2,), (1, 3)):
            with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids, \(1, 2\); got \("):
                call(ids, torch.ones(shape))
