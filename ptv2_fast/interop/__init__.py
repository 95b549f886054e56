"""Adapters of other packages: PEFT's, read and written, and the P-Tuning v2 paper's, read."""
