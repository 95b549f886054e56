"""What training shows: one line on a terminal, a line an epoch in a pipe."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from ptv2_fast.training import progress
from ptv2_fast.training.progress import TrainingProgress


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("scored", [False, True])
def test_an_epoch_is_a_line_with_speed_and_time_left(monkeypatch, terminal, scored):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200, color_system=None)
    shown = TrainingProgress("f1", console=console)
    args = SimpleNamespace(eval_strategy="epoch" if scored else "no")
    # A run of 4 epochs of 50 rows that was resumed after the first one.
    state = SimpleNamespace(max_steps=8, global_step=2, epoch=1.0, num_train_epochs=4)
    with shown:
        shown.on_train_begin(args, state, None, train_dataloader=SimpleNamespace(dataset=range(50)))
        for epoch in (2.0, 3.0):
            now[0] += 40.0
            state.epoch, state.global_step = epoch, 2 * int(epoch)
            shown.on_log(args, state, None, logs={"loss": 1 / epoch})
            shown.on_step_end(args, state, None)
            shown.on_epoch_end(args, state, None)
            if scored:
                shown.on_evaluate(args, state, None, metrics={"eval_f1": 0.25 * epoch})
    scores = [", dev f1 0.5000", ", dev f1 0.7500"] if scored else ["", ""]
    expected = [
        f"epoch 2 of 4: loss 0.5000{scores[0]}, 1.2 rows/s, 1:20 left",
        f"epoch 3 of 4: loss 0.3333{scores[1]}, 1.2 rows/s, 0:40 left",
    ]
    said = file.getvalue()
    if terminal:
        assert all(line in said for line in expected) and "steps" in said
    else:
        assert said.splitlines() == expected
