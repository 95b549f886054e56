"""Kept under this name for those who import it; see `ptv2_fast.saving.hub`."""

from ptv2_fast.saving.hub import CARD_NAME, adapter_folder, model_card, push_to_hub

__all__ = ["CARD_NAME", "adapter_folder", "model_card", "push_to_hub"]
