"""What was trained: how large each virtual token is in each layer, and which words it is nearest to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_fast.backbone.at_rest import at_rest
from ptv2_fast.report.html import Html, Section, el, join, note, number
from ptv2_fast.report.svg import heat
from ptv2_fast.training.loading import LoadedAdapter

# Virtual tokens that the page has room for, words shown for each, and rows of the vocabulary compared at once.
MOST_TOKENS, NEAREST, _AT_ONCE = 128, 3, 8192
_NO_WORDS = {
    "prefix": "A prefix is keys and values, which are no vectors of words: no vocabulary is near them.",
    "deep": "In the first layer a virtual token stands among embeddings; in others it is a hidden state, near no word.",
}


@torch.no_grad()
def prompts_section(loaded: LoadedAdapter) -> Section:
    """Norms as a map, and the nearest words where a virtual token is an embedding."""
    model = loaded.chosen().model
    encoder = model.adapters[model.active_adapter].encoder
    training = encoder.training
    encoder.eval()
    with at_rest(model):
        prompts = encoder().detach().float().cpu()
        charts = _norms(prompts, encoder.injection, encoder.layers)
        words = _words(prompts, encoder, model, loaded.codec.tokenizer)
    encoder.train(training)
    cut = f"The first {MOST_TOKENS} of {prompts.shape[-2]} virtual tokens." if prompts.shape[-2] > MOST_TOKENS else None
    parts = [el("div", *charts, class_="charts"), note(cut) if cut else None, words]
    return Section("The prompt", join(parts))


def _norms(prompts: Tensor, injection: str, layers: Sequence[int]) -> list[Html]:
    """One map, or of a prefix one for keys and one for values."""
    names = [f"layer {layer}" for layer in layers]
    if injection == "shallow":
        return [heat("Norm of each virtual token", ["input"], _shown(prompts.norm(dim=-1)[None]))]
    if injection == "deep":
        return [heat("Norm by layer and virtual token", names, _shown(prompts.norm(dim=-1)))]
    sizes = prompts.square().sum(dim=(2, 4)).sqrt()  # (L', 2, P): over heads and their numbers
    return [
        heat(f"Norm of the {what}, by layer and virtual token", names, _shown(sizes[:, side]))
        for side, what in enumerate(("keys", "values"))
    ]


def _shown(values: Tensor) -> list[list[float]]:
    found: list[list[float]] = values[:, :MOST_TOKENS].tolist()
    return found


def _words(prompts: Tensor, encoder: Any, model: Any, tokenizer: Any) -> Html:
    """The nearest words, or why there are none."""
    title = el("h3", "Nearest words")
    if encoder.injection == "prefix":
        return join([title, note(_NO_WORDS["prefix"])])
    if encoder.injection == "deep" and encoder.layers[0] != 0:
        return join([title, note("The first layer has no prompt. ", _NO_WORDS["deep"])])
    first = (prompts if encoder.injection == "shallow" else prompts[0])[:MOST_TOKENS]
    table_of_words: Any = getattr(model.base_model.get_input_embeddings(), "weight", None)
    if not _comparable(table_of_words, first):
        return join([title, note("The base's words are vectors of another kind or width: nothing is compared.")])
    near = nearest(first, table_of_words, NEAREST)
    rows = [
        el("li", el("small", token), *_named(found, tokenizer), el("span", number(found[0][1], 2), class_="n"))
        for token, found in enumerate(near)
    ]
    said = "By the cosine to the base's input embeddings, that of the nearest behind; near 0 a token resembles no word."
    more = [" ", _NO_WORDS["deep"]] if encoder.injection == "deep" else []
    return join([title, el("ul", *rows, class_="near"), note(said, *more)])


def _comparable(words: Any, states: Tensor) -> bool:
    return isinstance(words, Tensor) and words.is_floating_point() and words.shape[1:] == states.shape[1:]


def nearest(states: Tensor, words: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The words with the largest cosines to each state, and those.

    Args:
        states: (P, E) float.
        words: (V, E) float, any device.
    """
    unit = F.normalize(states.float(), dim=-1)
    blocks = [unit @ F.normalize(block.detach().float().cpu(), dim=-1).T for block in words.split(_AT_ONCE)]
    best = torch.cat(blocks, dim=1).topk(min(count, len(words)), dim=1)
    return [list(zip(i, v, strict=True)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def _named(found: Sequence[tuple[int, float]], tokenizer: Any) -> list[object]:
    """Words as the vocabulary spells them; ids that it does not name as numbers."""
    names = [tokenizer.convert_ids_to_tokens(index) or str(index) for index, _ in found]
    return [part for name in names for part in (el("code", name), " ")]
