"""Whole training steps: their time and what they hold."""
