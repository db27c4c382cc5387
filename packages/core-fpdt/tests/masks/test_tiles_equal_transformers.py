"""Tiles put together are the mask that transformers makes, however they are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from core_fpdt.masks import LazyMask, lazy_mask

KINDS = {
    "causal": create_causal_mask,
    "sliding": create_sliding_window_causal_mask,
    "chunked": create_chunked_causal_mask,
}
relaxed = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def padding(draw: st.DrawFn, batch: int, length: int) -> Tensor | None:
    """A 2D mask: none, padded on either side or both, with holes, or with nothing real in a row."""
    kind = draw(st.sampled_from(["none", "ones", "sides", "holes"]))
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in mask:
        if kind == "sides":
            row[: draw(st.integers(0, length))] = 0
            row[length - draw(st.integers(0, length)) :] = 0
        if kind == "holes":
            row[draw(st.lists(st.integers(0, length - 1), max_size=4))] = 0
    return mask


@st.composite
def positions(draw: st.DrawFn, batch: int, length: int) -> Tensor:
    """Positions that restart, jump, or stand still: whatever transformers takes for packed."""
    steps = st.sampled_from([1, 1, 1, 1, 0, -3, 2])
    rows = []
    for _ in range(batch):
        row = [draw(st.integers(0, 2))]
        while len(row) < length:
            row.append(max(0, row[-1] + draw(steps)) if draw(st.booleans()) else 0)
        rows.append(row)
    return torch.tensor(rows)


@st.composite
def documents(draw: st.DrawFn, batch: int, length: int) -> Tensor:
    """Positions of documents one after another."""
    rows = []
    for _ in range(batch):
        cuts = sorted(draw(st.sets(st.integers(1, length), max_size=4)) | {length})
        row = torch.cat([torch.arange(b - a) for a, b in zip([0, *cuts], cuts, strict=False)])
        rows.append(row)
    return torch.stack(rows)


@st.composite
def blocks(draw: st.DrawFn, batch: int, length: int) -> Tensor:
    """Numbers of blocks, -1 between them; sometimes a number comes twice."""
    numbers = st.lists(st.integers(-1, 3), min_size=length, max_size=length)
    rows = [draw(numbers) if draw(st.booleans()) else sorted(draw(numbers)) for _ in range(batch)]
    return torch.tensor(rows)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, int, int, dict[str, Any], dict[str, Any], list[int]]:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    kind = draw(st.sampled_from(list(KINDS)))
    changes: dict[str, Any] = {
        "sliding_window": draw(st.integers(1, 24)),
        "attention_chunk_size": draw(st.integers(1, 24)),
        "is_causal": draw(st.sampled_from([True, True, True, False])),
    }
    arguments: dict[str, Any] = {"attention_mask": draw(padding(batch, length))}
    if draw(st.booleans()):
        arguments["position_ids"] = draw(
            st.one_of(positions(batch, length), documents(batch, length))
        )
    if draw(st.booleans()) and (changes["is_causal"] or kind == "chunked"):
        arguments["block_sequence_ids"] = draw(blocks(batch, length))
    if draw(st.booleans()):
        table = torch.rand(batch, length, length, generator=torch.Generator().manual_seed(0)) > 0.5
        which = draw(st.sampled_from(["or_mask_function", "and_mask_function"]))
        arguments[which] = lambda b, h, q, k: table[b, q, k]
    cuts = draw(st.lists(st.integers(1, length), max_size=5))
    return kind, batch, length, changes, arguments, cuts


@relaxed
@given(case=cases())
def test_whatever_the_entry_points_are_asked_for(entry, assembled, case) -> None:
    kind, batch, length, changes, arguments, cuts = case
    mask, wanted = entry(KINDS[kind], length, batch, changes, **arguments)
    assert isinstance(mask, LazyMask)
    assert torch.equal(mask.dense().expand_as(wanted), wanted)
    assert torch.equal(assembled(mask, cuts), wanted)


@relaxed
@given(
    kind=st.sampled_from(["causal", "sliding"]),
    past=st.integers(0, 12),
    length=st.integers(1, 6),
    window=st.integers(1, 14),
    data=st.data(),
)
def test_calls_that_go_on_after_cached_tokens(entry, assembled, kind, past, length, window, data):
    changes = {"sliding_window": window, "layer_types": [f"{kind}_attention"]}
    config = LlamaConfig(num_hidden_layers=1, **changes) if kind == "sliding" else None
    cache = DynamicCache(config=config)
    if past:
        cache.update(torch.zeros(2, 1, past, 8), torch.zeros(2, 1, past, 8), 0)
    padded = data.draw(padding(2, past + length))
    mask, wanted = entry(
        KINDS[kind], length, 2, changes, past_key_values=cache, attention_mask=padded
    )
    assert mask.queries == (past, past + length)
    cuts = data.draw(st.lists(st.integers(1, past + length), max_size=4))
    assert torch.equal(assembled(mask, cuts), wanted)


def test_a_mask_shorter_than_the_keys_hides_what_lies_behind_it(both_ways, assembled) -> None:
    padded = torch.ones(2, 5, dtype=torch.bool)
    mask, wanted = both_ways(batch_size=2, q_length=8, kv_length=8, attention_mask=padded)
    assert torch.equal(assembled(mask, [3, 6]), wanted)
    assert not wanted[..., 5:].any()


def test_a_mask_longer_than_the_keys_is_looked_up_by_index(both_ways, assembled) -> None:
    padded = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) > 0.3
    mask, wanted = both_ways(
        batch_size=2, q_length=3, kv_length=8, q_offset=9, kv_offset=4, attention_mask=padded
    )
    assert torch.equal(assembled(mask, [6, 8, 10]), wanted)


def test_the_first_query_may_be_told_by_a_tensor(both_ways, assembled) -> None:
    mask, wanted = both_ways(batch_size=1, q_length=2, kv_length=9, q_offset=torch.tensor(7))
    assert torch.equal(assembled(mask, [4]), wanted[:1])


def test_a_mask_is_made_where_transformers_would_skip_it() -> None:
    arguments = {"batch_size": 1, "q_length": 4, "kv_length": 4, "allow_is_causal_skip": True}
    mask = lazy_mask(**arguments, attention_mask=torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(mask.dense(), torch.ones(1, 1, 4, 4).tril().bool())


@pytest.mark.parametrize("span", [(0, 0), (3, 2), (-1, 2), (2, 9)])
def test_ranges_outside_of_the_mask_are_refused(span) -> None:
    mask = lazy_mask(batch_size=1, q_length=8, kv_length=8)
    for queries, keys in ((span, (0, 8)), ((0, 8), span)):
        with pytest.raises(ValueError, match="within"):
            mask.tile(queries, keys)
