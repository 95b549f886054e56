"""The classes of two tutorials on P-Tuning v2, by their own names, signatures and state dicts, on the fast path.

A program of theirs runs by changing the import; docs/from-the-tutorials.md says what is where. `PTuningV2Model` is the
second tutorial's class here, not `ptv2_fast.PTuningV2Model`.
"""

from ptv2_fast.tutorials.deep import DeepPromptEncoder, P_Tuning_Model
from ptv2_fast.tutorials.evolving import PTuningV2Model, SimpleTransformerLayer

__all__ = ["DeepPromptEncoder", "P_Tuning_Model", "PTuningV2Model", "SimpleTransformerLayer"]
