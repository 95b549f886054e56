"""Prompts: the trained parameters, and how they become each layer's keys and values."""
