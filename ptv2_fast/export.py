"""Kept under this name for those who import it; see `ptv2_fast.saving.export`."""

from ptv2_fast.saving.export import (
    FORMATS as FORMATS,
)
from ptv2_fast.saving.export import (
    export_prompts as export_prompts,
)
from ptv2_fast.saving.export import (
    prompt_tensors as prompt_tensors,
)
