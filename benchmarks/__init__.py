"""Measurements: run `python -m benchmarks.run` from the root of a checkout; nothing here is installed."""
