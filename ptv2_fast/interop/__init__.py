"""Adapters of other packages, read: PEFT's and the P-Tuning v2 paper's. `saving.peft_export` writes PEFT's."""
