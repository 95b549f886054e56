"""The plots of the step and memory suites, drawn from result files into benchmarks/results/plots/."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks.goals import best_of_ours, milliseconds
from benchmarks.step.report import rung_names

# What a bar or a line is called.
_LABELS = {
    "floor": "prompt-less", "floor_compiled": "prompt-less, compiled", "literal_sdpa": "literal", "peft": "PEFT",
    "peft_compiled": "PEFT, compiled", "best": "ours",
}  # fmt: skip
_BARS = ("floor_compiled", "literal_sdpa", "peft", "peft_compiled", "best")
_AGAINST = ("literal_sdpa", "peft", "peft_compiled")
_AT_MOST_CELLS = 16

Drawing = Callable[[object, list[Mapping]], None]


def drawable(results: list[Mapping], latest: Callable[..., list[dict]]) -> dict[str, tuple[Drawing, list[Mapping]]]:
    """File name -> what draws it and from which cells, for every plot that there is data for.

    Args:
        results: result files.
        latest: `benchmarks.report.latest_cells`.
    """
    found = {}
    for device in ("cuda", "cpu"):
        steps = [cell for cell in latest(results, "steps", device) if cell.get("kind") != "stream" and _usual(cell)]
        memory = latest(results, "memory", device)
        for name, (draw, cells) in {
            "step-against-floor": (against_floor, [c for c in steps if _floor(c)]),
            "ladder": (ladder, [c for c in steps if milliseconds(c, "ours_0_plain")]),
            "speedup-over-padding": (over_padding, steps if _several(steps, "padding") else []),
            "speedup-over-prompt": (over_prompt, steps if _several(steps, "P") else []),
            "peak-memory": (peak_memory, memory),
        }.items():
            if cells:
                found[f"{name}-{device}.svg"] = (draw, cells)
    return found


def links(plots: Iterable[str]) -> str:
    """Markdown that shows the plots."""
    return "\n".join(f"![{name.removesuffix('.svg')}](results/plots/{name})" for name in sorted(plots))


def draw(plots: Mapping[str, tuple[Drawing, list[Mapping]]], folder: Path) -> list[Path]:
    """Draw every plot; gives the files. Without matplotlib there are none."""
    if not plots or importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # The same data give the same file, so that a plot changes when a measurement does.
    with matplotlib.rc_context({"svg.hashsalt": "ptv2_fast", "font.size": 8}):
        for name, (drawing, cells) in plots.items():
            figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
            drawing(axes, cells)
            device = "one core of a CPU" if name.endswith("-cpu.svg") else "GPU"
            axes.set_title(f"{axes.get_title()} ({device})")
            figure.savefig(folder / name, metadata={"Date": None})
            pyplot.close(figure)
            written.append(folder / name)
    return written


def against_floor(axes, cells: list[Mapping]) -> None:
    """Step time over that of the prompt-less model: bars of a cell side by side."""
    cells = cells[:_AT_MOST_CELLS]
    names = [name for name in _BARS if any(_ms(cell, name) for cell in cells)]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        heights = [(_ms(cell, name) or 0.0) / _floor(cell) for cell in cells]
        spots = [spot + (place - (len(names) - 1) / 2) * width for spot in range(len(cells))]
        axes.bar(spots, heights, width, label=_LABELS[name])
    axes.axhline(1.0, color="black", linewidth=0.8)
    _name_cells(axes, cells)
    axes.set_ylabel("time over the padded, prompt-less model's")
    axes.set_title("A training step against its floor")
    axes.legend()


def ladder(axes, cells: list[Mapping]) -> None:
    """Time of every rung over that of the lowest, one line for each cell."""
    cells = cells[:_AT_MOST_CELLS]
    names = [name for name in rung_names(cells) if any(milliseconds(cell, name) for cell in cells)]
    names.append("ours")
    for cell in cells:
        base = milliseconds(cell, "ours_0_plain")
        points = [(place, milliseconds(cell, name)) for place, name in enumerate(names)]
        points = [(place, ms / base) for place, ms in points if ms]
        axes.plot(*zip(*points, strict=False), marker="o", label=_short(cell))
    labels = ["all off" if name == "ours_0_plain" else name.split("_", 2)[-1] for name in names]
    axes.set_xticks(range(len(names)), [*(f"+ {x}" if x != "all off" else x for x in labels[:-1]), "defaults"])
    axes.tick_params(axis="x", rotation=20)
    axes.set_ylabel("time over that with every switch off")
    axes.set_title("The ladder, one more switch on at each rung")
    axes.legend(fontsize=6)


def over_padding(axes, cells: list[Mapping]) -> None:
    """Speed-up against the peers at each share of padding, one point for each cell."""
    _speedups(axes, cells, lambda case: 100 * case["padding"], "padding, %")
    axes.set_title("Speed-up against padding")


def over_prompt(axes, cells: list[Mapping]) -> None:
    """Speed-up against the peers at each prompt length over text length, one point for each cell."""
    _speedups(axes, cells, lambda case: case["P"] / case["N"], "P / N")
    axes.set_xscale("log")
    axes.set_title("Speed-up against the prompt's length")


def peak_memory(axes, cells: list[Mapping]) -> None:
    """Peak memory of a step over that of the prompt-less model."""
    cells = [cell for cell in cells if cell["peers"].get("floor", {}).get("peak_bytes")][:_AT_MOST_CELLS]
    names = ("literal_sdpa", "peft", "best")
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        heights = [_peak(cell, name) / cell["peers"]["floor"]["peak_bytes"] for cell in cells]
        axes.bar([spot + (place - 1) * width for spot in range(len(cells))], heights, width, label=_LABELS[name])
    axes.axhline(1.0, color="black", linewidth=0.8)
    _name_cells(axes, cells)
    axes.set_ylabel("peak over the prompt-less model's")
    axes.set_title("Memory of a training step")
    axes.legend()


def _speedups(axes, cells, along: Callable[[Mapping], float], label: str) -> None:
    for name in _AGAINST:
        points = [
            (along(cell["case"]), milliseconds(cell, name) / _ms(cell, "best"))
            for cell in cells
            if milliseconds(cell, name) and _ms(cell, "best")
        ]
        if points:
            axes.scatter(*zip(*points, strict=False), label=f"against {_LABELS[name]}", alpha=0.7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    axes.set_ylabel("times faster")
    axes.legend()


def _ms(cell: Mapping, name: str) -> float | None:
    name = best_of_ours(cell) if name == "best" else name
    return milliseconds(cell, name) if name else None


def _peak(cell: Mapping, name: str) -> float:
    name = best_of_ours(cell, "peak_bytes") if name == "best" else name
    return cell["peers"].get(name, {}).get("peak_bytes") or 0.0


def _floor(cell: Mapping) -> float | None:
    """The compiled floor where there is one; on the CPU the eager one."""
    return milliseconds(cell, "floor_compiled") or milliseconds(cell, "floor")


def _usual(cell: Mapping) -> bool:
    return bool(cell["case"]["P"]) and cell["case"].get("peers") != "tasks"


def _several(cells: list[Mapping], field: str) -> bool:
    """Whether the field differs among the cells in which ours was timed."""
    return len({cell["case"][field] for cell in cells if best_of_ours(cell)}) > 1


def _short(cell: Mapping) -> str:
    return cell["id"].rsplit("-", 1)[0] if cell["id"].endswith(("bf16", "fp32")) else cell["id"]


def _name_cells(axes, cells: list[Mapping]) -> None:
    axes.set_xticks(range(len(cells)), [_short(cell) for cell in cells])
    axes.tick_params(axis="x", rotation=30)
