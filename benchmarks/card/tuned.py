"""Ours with the launch configurations that a tuning run found best, to be timed beside ours as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from benchmarks.attention.provider import Provider
from benchmarks.attention.providers import all_providers
from ptv2_fast.kernels import launch


def providers(winners: Mapping[str, object]) -> list[Provider]:
    """`ours_tuned`; none where nothing was tuned.

    Args:
        winners: `attention.tune_suite.winners`.
    """
    tables = winners.get("tables") if winners else None
    if not tables:
        return []
    ours = next(provider for provider in all_providers() if provider.name == "ours")
    call = f"{ours.call}, launched as the tuning run before found best"
    return [replace(ours, name="ours_tuned", call=call, around=lambda: launched_by(tables))]


@contextmanager
def launched_by(tables: Mapping[str, Mapping]) -> Iterator[None]:
    """Within this context kernels are launched by these tables where they have a row; whatever thread launches them."""
    usual = launch.choose_config

    def choose(arch, head_dim, dtype, kernel_pass, crowded=False):
        precision = "single" if dtype.itemsize == 4 else "half"
        row = tables.get(str(arch), {}).get(precision, {}).get(kernel_pass, {}).get(str(launch.config_row(head_dim)))
        if row is None or crowded:
            return usual(arch, head_dim, dtype, kernel_pass, crowded)
        return launch.LaunchConfig(*row["config"])

    launch.choose_config = choose
    try:
        yield
    finally:
        launch.choose_config = usual
