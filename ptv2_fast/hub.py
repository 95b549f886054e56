"""Kept under this name for those who import it; see `ptv2_fast.saving.hub`."""

from ptv2_fast.saving.hub import (
    CARD_NAME as CARD_NAME,
)
from ptv2_fast.saving.hub import (
    adapter_folder as adapter_folder,
)
from ptv2_fast.saving.hub import (
    model_card as model_card,
)
from ptv2_fast.saving.hub import (
    push_to_hub as push_to_hub,
)
