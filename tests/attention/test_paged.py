"""Rows of any two lengths over keys in pages: each row is what the reference gives for it alone."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast.attention import prompt_attention
from ptv2_fast.attention.paged import Pages, layout
from ptv2_fast.attention.prompt_batch import LayerPrompt, PromptBatch
from tolerances import assert_equal

H, KV, D, P, PLACES = 4, 2, 16, 5, 60
OPTIONS = {"scale": None, "dropout_p": 0.0, "window": None, "softcap": None}
# (queries, keys) of each row: what stands in the pages is what a row sees beside its own.
ROWS = {
    "first parts alone": [(5, 5), (1, 1), (7, 7)],
    "single queries of one length": [(1, 6), (1, 6), (1, 6)],
    "single queries of any length": [(1, 3), (1, 9), (1, 1)],
    "parts behind others": [(4, 9), (3, 11)],
    "rows without a query": [(0, 0), (5, 5), (0, 4), (4, 4), (1, 3), (0, 2), (1, 6), (0, 0)],
    "everything": [(1, 4), (1, 7), (5, 5), (3, 3), (1, 2), (6, 8), (1, 1), (4, 4)],
}


def _pages(rows):
    """Pages whose places are dealt out at random, and the places of each row's keys, its own last."""
    cached = any(queries < keys for queries, keys in rows)
    order = torch.randperm(PLACES - 1) + 1
    places = [part.clone() for part in order.split([keys for _, keys in rows] + [PLACES - 1 - sum(k for _, k in rows)])]
    read = torch.cat(places[:-1]) if cached else torch.empty(0, dtype=torch.long)
    # What is in no row's place must reach nobody.
    keys, values = (torch.full((PLACES, KV, D), float("nan")) for _ in range(2))
    for part in places[:-1]:
        keys[part], values[part] = torch.randn(len(part), KV, D), torch.randn(len(part), KV, D)
    return keys, values, places[:-1], read


@pytest.mark.parametrize("bank", [True, False], ids=["bank", "one prompt"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.4}, {"window": 4}], ids=str)
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "torch") for name in ROWS), ("everything", "triton"), ("first parts alone", "triton")],
)
def test_each_row_is_itself_alone(name, backend, options, bank):
    torch.manual_seed(len(name))
    rows, options = ROWS[name], {**OPTIONS, **options}
    stored_k, stored_v, places, read = _pages(rows)
    own = torch.cat([part[keys - queries :] for part, (queries, keys) in zip(places, rows, strict=True)])
    q = torch.randn(1, H, len(own), D)
    k, v = (stored[own].transpose(0, 1)[None].clone() for stored in (stored_k, stored_v))
    stored_k[own] = stored_v[own] = float("nan")  # they are there once they have been written
    entries = (3,) if bank else ()
    prompt = LayerPrompt(
        torch.randn(*entries, KV, P, D),
        torch.randn(*entries, KV, P, D),
        torch.randn(*entries, H, P),
        torch.tensor([5, 0, 2], dtype=torch.int32) if bank else None,
    )
    index = torch.randint(0, 3, (len(rows),)) if bank else None
    lengths = [list(side) for side in zip(*rows, strict=True)]
    found = layout(*lengths, read, PromptBatch((prompt,), index, backend=backend))

    def update(layer, keys, values):
        assert layer == 0
        stored_k[own], stored_v[own] = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        if not read.numel():
            return keys, values
        return tuple(stored[found.read_index].transpose(0, 1)[None] for stored in (stored_k, stored_v))

    out = Pages(update, [found]).attend(0, q, k, v, prompt, **options)
    start = 0
    for row, (queries, _) in enumerate(rows):
        keys, values = (stored[places[row]].transpose(0, 1)[None] for stored in (stored_k, stored_v))
        lens = None if prompt.lens is None else prompt.lens
        alone = prompt_attention(
            q[:, :, start : start + queries].double(),
            keys.double(),
            values.double(),
            prompt.keys.double(),
            prompt.values.double(),
            prompt_bias=prompt.bias.double(),
            prompt_lens=lens,
            prompt_index=None if index is None else index[row : row + 1],
            causal=True,
            backend="reference",
            **options,
        )
        assert_equal(out[:, start : start + queries].double(), alone.transpose(1, 2), f"row {row}", torch.float32)
        start += queries


def test_few_calls_serve_many_rows():
    """Rows that generate are one dense batch, new texts one packed batch, and no key is read twice."""
    queries, keys = [1, 1, 1, 4, 6, 3], [8, 2, 5, 4, 6, 9]
    found = layout(queries, keys, torch.arange(sum(keys)) + 1, PromptBatch(()))
    decoding, new, part = found.groups
    assert (decoding.rows, new.rows, part.rows) == (3, None, 1)
    assert new.batch.cu_seqlens.tolist() == [0, 4, 10] and new.batch.max_seqlen == 6
    assert decoding.key_mask.sum(-1).tolist() == [8, 2, 5] and part.key_mask is None
    assert found.read_index[found.read_index > 0].tolist() == list(range(1, sum(keys) + 1))
    assert len(found.read_index) == 3 * 8 + 10 + 9
