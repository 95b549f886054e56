"""The examples of docs/from-the-tutorials.md, run as they stand, on tiny models under the names that they use."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers

from ptv2_fast import tutorials
from tiny_folders import WORDS, bert_folder, tiny_tokenizer
from tolerances import assert_equal

PAGE = Path(__file__).parents[2] / "docs" / "from-the-tutorials.md"


def _tiny_gpt2() -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=4
    )
    return transformers.GPT2LMHeadModel(config)


def test_the_pages_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert_folder(tmp_path / "bert-base-cased")
    _tiny_gpt2().save_pretrained("gpt2")
    names = {
        "torch": torch,
        "tokenizer": tiny_tokenizer(),
        "causal_tokenizer": tiny_tokenizer(causal=True),
        "AutoModel": transformers.AutoModel,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
    }
    imported, deep, pairs, inference, shared, moved, evolving, real = re.findall(
        r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    exec(imported, names)
    assert {names[name] for name in tutorials.__all__} == {getattr(tutorials, name) for name in tutorials.__all__}
    exec(deep, names)
    assert names["logits"].shape == (2, 2) and names["tags"].shape == (*names["batch"]["input_ids"].shape, 9)
    exec(pairs, names)
    trained = names["model"]
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)
    exec(inference, names)
    args = names["batch"]["input_ids"], names["batch"]["attention_mask"]
    assert names["guess"].shape == (2,) and names["model"] is not trained
    assert_equal(names["model"](*args), trained.eval()(*args), "the loaded checkpoint")
    exec(shared, names)
    assert names["sentiment"].base_model is names["ner"].base_model
    exec(moved, names)
    assert_equal(names["same"], names["model"](*args, 0), "get_ptv2_model")
    exec(evolving, names)
    assert names["text_logits"].shape == (4, 100, 50257)
    assert [name for name, p in names["model"].named_parameters() if p.grad is not None] == ["prompt_embeddings"]
    exec(real, names)
