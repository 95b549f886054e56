"""Whatever is written has the mode that the umask gives any new file, also where a temporary file came first."""

from __future__ import annotations

import os
import stat

import pytest
import torch

from benchmarks.record import write_json as write_result
from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.saving.export import export_prompts
from ptv2_fast.storage.files import write_set, write_whole
from ptv2_fast.storage.tensors import write_tensors
from ptv2_fast.training.curves import plot_curves
from ptv2_fast.training.run_folder import RunFolder, write_json
from ptv2_fast.training.search import Trial, plot
from tiny_folders import tiny_bert


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_mode_of_any_new_file(tmp_path, umask, mode):
    heads = {"task": HeadConfig("SEQ_CLS", 2)}
    model = get_ptv2_model(
        tiny_bert(), PTuningV2Config("SEQ_CLS", num_virtual_tokens=2, injection="prefix", heads=heads)
    )
    model.add_adapter("other", PTuningV2Config("SEQ_CLS", num_virtual_tokens=2, heads=heads))
    run = RunFolder(tmp_path / "run")
    writers = {
        "whole": lambda: write_whole(tmp_path / "whole", lambda path: path.write_text("x")),
        "set": lambda: write_set(
            tmp_path / "set", {"a": lambda path: path.write_text("x"), "b/c": lambda path: path.write_text("y")}
        ),
        "tensors": lambda: write_whole(
            tmp_path / "x.safetensors", lambda path: write_tensors(path, {"x": torch.zeros(1)}, {})
        ),
        "adapters": lambda: model.save_pretrained(tmp_path / "adapters"),
        "export": lambda: export_prompts(model, tmp_path / "kv.safetensors", "kv"),
        "settings": lambda: write_json(tmp_path / "settings.json", {"a": 1}),
        "begin": lambda: run.begin({}, {}, "base"),
        "finish": lambda: run.finish(lambda path: model.save_pretrained(path, adapter_names=["other"]), {}, {}),
        "curves": lambda: plot_curves([{"loss": 1.0, "step": 1}], tmp_path / "curves.png"),
        "trials": lambda: plot([Trial(0, "deep", 2, 1e-2, 0.5)], "f1", tmp_path / "trials.png"),
        "benchmark": lambda: write_result(tmp_path / "result.json", {"a": 1}),
    }
    before = os.umask(umask)
    try:
        for name, write in writers.items():
            there = set(tmp_path.rglob("*"))
            write()
            new = [path for path in set(tmp_path.rglob("*")) - there if path.is_file()]
            assert new, name
            found = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in new}
            assert set(found.values()) == {oct(mode)}, (name, found)
    finally:
        os.umask(before)
