"""Sizes from config.json alone are those of the model that is built of it."""

from __future__ import annotations

import json

import pytest

from ptv2_fast.training.info import _built_facts
from ptv2_fast.training.plain_configs import PLAIN, plain_facts, sizes_in
from tiny_models import NOT_SERVED, tiny_config


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if kind not in NOT_SERVED])
def test_the_file_says_what_the_model_is(kind, tmp_path):
    tiny_config(kind).save_pretrained(tmp_path)
    found = plain_facts(tmp_path)
    assert found == _built_facts(str(tmp_path), str(tmp_path), {})[0]
    config = json.loads((tmp_path / "config.json").read_text())
    layers = next(name for name in ("num_hidden_layers", "n_layers", "n_layer") if name in config)
    for odd in ({layers: None}, {"is_decoder": True}, {"model_type": "t5"}, {"quantization_config": {}}):
        assert sizes_in({**config, **odd}) is None, odd
