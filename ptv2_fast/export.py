"""Kept under this name for those who import it; see `ptv2_fast.saving.export`."""

from ptv2_fast.saving.export import FORMATS, export_prompts, prompt_tensors

__all__ = ["FORMATS", "export_prompts", "prompt_tensors"]
