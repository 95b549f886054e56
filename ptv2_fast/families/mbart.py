"""mBART: BART's stacks with norms before their parts and one behind the last layer; its decoder starts at languages."""

from __future__ import annotations

from ptv2_fast.families.bart import Bart


class MBart(Bart):
    norm_path = "self_attn_layer_norm"
