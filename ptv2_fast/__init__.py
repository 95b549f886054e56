"""P-Tuning v2: deep prompt tuning of frozen transformers at the price of the frozen model."""
