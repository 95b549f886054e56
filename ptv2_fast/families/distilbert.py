"""DistilBERT: BERT's shape under other names, with layers that do not know their index."""

from __future__ import annotations

from ptv2_fast.families.bert import Bert


class DistilBert(Bert):
    skips_unread_tokens = False
    layer_index = "layer_idx"
    layers_path = "transformer.layer"
    attention_path = "attention"
    key_path, value_path = "k_lin", "v_lin"
