"""The README's example for PEFT's users, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tiny_folders import llama_folder, tiny_llama, tiny_tokenizer

peft = pytest.importorskip("peft")
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = str(llama_folder(tmp_path / "tiny-lm"))
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(tiny_llama(), settings).save_pretrained("peft-adapter")
    names = {"name": name, "texts": ["the film", "anna likes paris"]}
    names["tokenizer"] = tiny_tokenizer(causal=True)
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "from_peft" in block]
    exec(block, names)
    assert peft.PeftModel.from_pretrained(tiny_llama(), "for-peft").active_adapter == "default"
