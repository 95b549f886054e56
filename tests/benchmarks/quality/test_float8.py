"""What the table of the float8 study says is what its result file has."""

from __future__ import annotations

from benchmarks.quality.float8_table import table
from benchmarks.report import table as markdown


def _cells(*accuracies):
    cells = []
    for seed, (plain, own) in enumerate(accuracies):
        errors = {"float8": 0.02 + 0.02 * seed}
        cells.append({"id": f"gradient-seed{seed}", "task": "sst2", "seed": seed, "relative_errors": errors})
        for way, accuracy in (("plain", plain), ("float8", own)):
            cells.append({"task": "sst2", "seed": seed, "way": way, "test": {"accuracy": accuracy, "loss": 0.5}})
    return cells


def test_points_are_averaged_over_seeds_and_held_to_the_goal():
    met = table(_cells((0.9, 0.898), (0.8, 0.802)), markdown)
    assert "| sst2, accuracy | float8 | 89.80 / 80.20 | 0.00, met | 0.5000 | 3.0 % |" in met
    assert "| sst2, accuracy | float8 | 89.00 / 80.00 | 0.50, **not met** |" in table(
        _cells((0.9, 0.89), (0.8, 0.8)), markdown
    )


def test_a_seed_that_is_not_through_counts_nowhere():
    half = [cell for cell in _cells((0.9, 0.9), (0.8, 0.7)) if (cell["seed"], cell.get("way")) != (1, "float8")]
    assert "| sst2, accuracy | plain | 90.00 | – |" in table(half, markdown) and "0.00, met" in table(half, markdown)


def test_each_task_has_rows_and_a_metric_of_its_own():
    tags = {"task": "wnut17", "seed": 0, "test": {"f1": 0.25, "accuracy": 0.9, "loss": 0.3}}
    cells = [*_cells((0.9, 0.9)), {**tags, "way": "plain"}, {**tags, "way": "float8", "test": {"f1": 0.2, "loss": 0.3}}]
    made = table(cells, markdown)
    assert "| wnut17, f1 | float8 | 20.00 | 5.00, **not met** | 0.3000 |" in made
    assert made.index("sst2, accuracy | plain") < made.index("wnut17, f1 | plain")
    assert "wnut17" not in table(_cells((0.9, 0.9)), markdown)
