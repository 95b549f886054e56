"""Curves: what is drawn, and that the file is whole or untouched."""

from __future__ import annotations

import pytest

from ptv2_fast.training.curves import curves_of, plot_curves

HISTORY = [
    {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 0.5, "step": 10},
    {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 1.0, "step": 20},
    {"eval_loss": 1.5, "eval_f1": 0.4, "eval_runtime": 9.0, "epoch": 1.0, "step": 20},
    {"train_runtime": 3.0, "train_samples_per_second": 5.0, "train_loss": 1.5, "step": 20},
]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def blank_pictures():
    """Not here: these are looked at."""


def test_curves_of_a_trainer_log():
    assert curves_of(HISTORY) == (
        "step",
        {
            "loss": [(10.0, 2.0), (20.0, 1.0)],
            "eval_loss": [(20.0, 1.5)],
            "eval_f1": [(20.0, 0.4)],
        },
    )


def test_axis_falls_back():
    assert curves_of([{"loss": 1.0, "epoch": 2}]) == ("epoch", {"loss": [(2.0, 1.0)]})
    assert curves_of([{"loss": 3.0}, {"loss": 1.0}]) == (
        "record",
        {"loss": [(1.0, 3.0), (2.0, 1.0)]},
    )
    assert curves_of([{"step": 1, "note": "text", "done": True}]) == ("step", {})


def test_writes_a_png_and_nothing_else(tmp_path):
    from matplotlib.image import imread

    path = plot_curves(HISTORY, tmp_path / "made" / "curves.png")
    assert path.read_bytes().startswith(PNG)
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]
    wide = imread(path).shape
    # Losses alone need one panel, half as wide.
    narrow = imread(plot_curves([{"loss": 1.0, "step": 1}], tmp_path / "loss.png")).shape
    assert wide[0] == narrow[0] and wide[1] == 2 * narrow[1]


def test_failure_leaves_the_old_file(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fail(self, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_curves(HISTORY, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("history", [[], [{"step": 1, "learning_rate": 0.1}]])
def test_refuses_to_draw_nothing(tmp_path, history):
    with pytest.raises(ValueError, match="history: expected losses or metrics"):
        plot_curves(history, tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []
