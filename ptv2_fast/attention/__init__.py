"""Prompt attention: one softmax over a prompt shared by the batch and each row's own keys."""

from ptv2_fast.attention.api import prompt_attention

__all__ = ["prompt_attention"]
