"""P-Tuning v2: deep prompt tuning of frozen transformers at the price of the frozen model."""

from ptv2_fast.config import HeadConfig, PTuningV2Config
from ptv2_fast.model import PTuningV2Model
from ptv2_fast.tasks import get_ptv2_model

__version__ = "0.1.0"
__all__ = ["HeadConfig", "PTuningV2Config", "PTuningV2Model", "get_ptv2_model"]
