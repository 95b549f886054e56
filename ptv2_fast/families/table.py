"""The table of supported model families: `python -m ptv2_fast.families.table docs/families.md` writes it."""

from __future__ import annotations

import sys
from pathlib import Path

from ptv2_fast.families.encoder_decoder import EncoderDecoder
from ptv2_fast.families.family import Family
from ptv2_fast.families.refused import REFUSED
from ptv2_fast.families.registry import OWN

_HEADING = """# Model families

Written by `python -m ptv2_fast.families.table docs/families.md`; a test fails where it is out of date.

A model type that is not here is tried on a few tokens: a base that makes its keys and values, counts its positions and
hides its text as a family of this table does is taken for one of that family (CamemBERT, Ernie, ERNIE 4.5, Granite,
StarCoder2, Qwen2-MoE, Gemma and Phi in `tests/families/test_recognise.py`); others are refused by name. A model of your
own is served once its family is registered: [adding-a-family.md](adding-a-family.md).

Every row runs in these tests, on a tiny random model with the family's own features on:

- `tests/behaviour/test_parity.py`: outputs and prompt gradients against the literal concat-and-slice form, in float64;
- `tests/behaviour/test_invariants.py`: padding on any side, packed rows, gradient checkpointing, a disabled prompt, a
  prompt per row, shapes, pooling; `tests/saving/test_saving.py`: save and load;
- `tests/forward/test_generation.py`: decoders generate with left padding, dynamic and static caches, none, in turns;
- `tests/behaviour/test_shape_audit.py`: no tensor of P + N rows; `tests/step/`: the savings of a training step;
- `tests/families/test_special.py`: what single families have of their own;
- `tests/behaviour/test_images_and_audio.py`, `tests/inputs/test_features.py`, `tests/step/test_feature_steps.py`: all
  of this for families that read images or sounds; `tests/families/test_clip_text.py` for CLIP's texts;
- `tests/forward/test_encoder_decoder*.py`: all of these for encoder-decoders, which have prompts in the encoder, the
  decoder's self-attention and, where asked for (`stacks`), its cross-attention; heads of ours and sentence vectors read
  the encoder's states, with prompts there alone, and the decoder does not run.

"""
_COLUMNS = ("model_type", "kind", "positions", "deep", "shallow", "prefix", "generation", "remarks")
# By what a family reads.
_ENCODERS = {"input_ids": "encoder", "pixel_values": "encoder of images", "input_features": "encoder of sounds"}
# What else there is to say of a model type; most need nothing.
_REMARKS = {
    "bart": "rows run with their tokens first, since positions are slots; no layerdrop; as many heads in either stack",
    "mbart": "as bart; the decoder starts at each row's language",
    "mt5": "as t5",
    "t5": "also T5EncoderModel; deep prompts and prefixes at the farthest distance; not on transformers before its T5 "
    "ran through the attention interface; T5ForQuestionAnswering is refused",
    "albert": "a prompt per repetition of the shared layer; transformers has no gradient checkpointing for it",
    "clip_text_model": "also with its projection; pools at each row's own end of text; `CLIPModel`: wrap one tower",
    "clip_vision_model": "also with its projection or classifier; VPT-deep, VPT-shallow (in front of the first norm)",
    "cohere": "logits of all tokens, since they are scaled",
    "cohere2": "windows; layers without one know no positions; logits of all tokens, since they are scaled",
    "deberta-v2": "v2 and v3; a prompt stands beyond all distances; rows stay padded",
    "dinov2": "also with its classifier; VPT-deep, VPT-shallow; not on transformers before its attention was handed "
    "what the model is called with (5.18 does)",
    "dinov2_with_registers": "as dinov2; registers are rows as patches are",
    "distilbert": "no token types",
    "electra": "shallow prompts have the size of word embeddings",
    "gemma2": "softcaps, windows; logits of all tokens, since they are capped",
    "gemma3_text": "windows, rotary tables by kind of layer",
    "gpt_neox": "prompt projections by PyTorch, not by the kernel",
    "gptj": "from transformers 5.24 on; before, its attention is code of its own and refused",
    "mistral": "windows",
    "modernbert": "windows; virtual tokens of a shallow prompt see all text",
    "modernbert-decoder": "windows, rotary tables by kind of layer; logits of all tokens, behind a head with a norm",
    "mpnet": "a prompt stands beyond all distances; rows stay padded; transformers cannot checkpoint its gradients",
    "olmo2": "norms behind attention; key norms over all heads together",
    "opt": "also the post-norm 350m; no layerdrop",
    "phi3": "windows; with longrope, texts up to where its frequencies change",
    "smollm3": "some layers without positions",
    "vit": "also with its classifier; VPT-deep, VPT-shallow",
    "whisper": "the encoder, also with its classifier; no layerdrop; layer weights of a classifier stay frozen",
}


def table() -> str:
    """The whole file."""
    rows = [_COLUMNS, tuple("---" for _ in _COLUMNS)]
    rows += [_row(name, family) for name, family in sorted(OWN.items())]
    return _HEADING + "\n".join(f"| {' | '.join(row)} |" for row in rows) + _footer()


def _row(name: str, family: Family) -> tuple[str, ...]:
    decodes = isinstance(family, EncoderDecoder)
    kind = "encoder-decoder" if decodes else _kind(family)
    positions = "relative" if family.relative_positions else "rotary" if family.rotary else "learned"
    shallow = "yes" if family.causal else "yes, as rows of the encoder" if decodes else "yes, as rows of the batch"
    generation = "yes" if "decoder" in kind else "no"
    return (f"`{name}`", kind, positions, "yes", shallow, "yes", generation, _REMARKS.get(name, ""))


def _kind(family: Family) -> str:
    if not family.causal:
        return _ENCODERS[family.reads]
    # CLIP's text sees no token ahead, and none is generated.
    return "causal encoder" if family.own_pooler else "decoder"


def _footer() -> str:
    return (
        "\n\nA sliding window counts the text's own tokens: a prompt is in every window, and padding between a row's\n"
        "tokens has no width (such rows are run unpadded; with a cache they are refused).\n"
        "\nRefused, and why:\n\n"
    ) + "".join(f"- `{name}`: {reason}.\n" for name, reason in sorted(REFUSED.items()))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(), encoding="utf-8")
