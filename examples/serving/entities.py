"""Entities of a text, with the places of their words, from the tags of its tokens."""

from __future__ import annotations

import bisect
import re
from types import SimpleNamespace
from typing import Any

import torch

# Words as tagged corpora split them: inner apostrophes, hyphens and points belong to them, other signs stand alone.
WORD = re.compile(r"\w+(?:['’\-.,]\w+)*|[^\w\s]")


def entities(job: SimpleNamespace, logits: torch.Tensor) -> list[dict[str, Any]]:
    """A text's entities. A word has the tag of its first token, as in `ptv2_fast.training` and on the command line."""
    tokens = [one for one in zip(job.encoded.offset_mapping, *logits.softmax(-1).max(-1), strict=True) if any(one[0])]
    ends, found, last = [end for (_, end), _, _ in tokens], [], "O"
    for word in WORD.finditer(job.text):
        _, score, tag = tokens[bisect.bisect_right(ends, word.start())]
        side, kind = re.fullmatch(r"(?:([BIES])-)?(.*)", job.served.labels[tag]).groups()
        if kind != "O" and (kind != last or side in ("B", "S")):
            found.append({"start": word.start(), "label": kind, "scores": []})
        if kind != "O":
            found[-1] |= {"end": word.end(), "scores": [*found[-1]["scores"], float(score)]}
        last = kind
    for one in found:
        scores = one.pop("scores")
        one |= {"text": job.text[one["start"] : one["end"]], "score": sum(scores) / len(scores)}
    return found
