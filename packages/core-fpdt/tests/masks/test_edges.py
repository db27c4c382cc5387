"""Nobody in front of an edge sees behind it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import masking_utils as made

from core_fpdt.masks import LazyMask, edges, lazy_mask


def causal(length: int) -> LazyMask:
    return lazy_mask(batch_size=1, q_length=length, kv_length=length)


@pytest.mark.parametrize(
    ("length", "chunk", "wanted"),
    [(1, 4, [0, 1]), (4, 4, [0, 4]), (5, 4, [0, 4, 5]), (12, 4, [0, 4, 8, 12]), (3, 9, [0, 3])],
)
def test_causal_sequences_are_cut_anywhere(length, chunk, wanted) -> None:
    assert edges(length, chunk, causal(length)) == wanted


def test_a_bidirectional_sequence_is_one_chunk() -> None:
    function = made.bidirectional_mask_function
    mask = lazy_mask(batch_size=1, q_length=20, kv_length=20, mask_function=function)
    assert mask.horizon(1) == 20
    assert edges(20, 4, mask) == [0, 20]


def test_so_is_one_where_everybody_sees_a_little_ahead() -> None:
    function = made.sliding_window_bidirectional_mask_function(1)
    mask = lazy_mask(batch_size=1, q_length=20, kv_length=20, mask_function=function)
    assert mask.horizon(4) == 5
    assert edges(20, 4, mask) == [0, 20]


def test_an_edge_moves_behind_the_block_that_it_would_cut() -> None:
    ids = torch.full((2, 24), -1)
    ids[0, 6:11] = 0
    ids[1, 10:14] = 0
    function = made.or_masks(made.causal_mask_function, made.blockwise_overlay(ids))
    mask = lazy_mask(batch_size=2, q_length=24, kv_length=24, mask_function=function)
    assert [mask.horizon(edge) for edge in (6, 7, 11, 14)] == [6, 11, 14, 14]
    assert edges(24, 8, mask) == [0, 14, 22, 24]


def test_documents_that_see_both_ways_are_not_cut() -> None:
    ids = torch.tensor([[0] * 5 + [1] * 6 + [2] * 9])
    function = made.packed_sequence_mask_function(ids)
    mask = lazy_mask(batch_size=1, q_length=20, kv_length=20, mask_function=function)
    assert edges(20, 4, mask) == [0, 5, 11, 20]


def test_the_nearest_of_several_rules_decides() -> None:
    ids = torch.tensor([[0] * 5 + [1] * 6 + [2] * 9])
    ahead = made.sliding_window_bidirectional_overlay(1)
    function = made.and_masks(ahead, made.packed_sequence_mask_function(ids))
    mask = lazy_mask(batch_size=1, q_length=20, kv_length=20, mask_function=function)
    assert [mask.horizon(edge) for edge in (4, 5, 6, 11)] == [5, 5, 7, 11]
    assert edges(20, 4, mask) == [0, 5, 11, 20]


def test_chunks_that_see_both_ways_are_not_cut() -> None:
    function = made.chunked_overlay(6, torch.tensor([0, 2]))
    mask = lazy_mask(batch_size=2, q_length=20, kv_length=20, mask_function=function)
    assert [mask.horizon(edge) for edge in (1, 6, 7)] == [6, 8, 12]
    assert edges(20, 4, mask) == [0, 20], "the rows have their chunks at different places"


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(data=st.data(), length=st.integers(1, 30), chunk=st.integers(1, 12), known=st.booleans())
def test_whatever_is_seen_ahead(assembled, data, length, chunk, known) -> None:
    numbers = st.lists(st.integers(-1, 4), min_size=length, max_size=length)
    ids = torch.tensor([data.draw(numbers)])
    ahead = (
        made.blockwise_overlay(ids) if known else lambda b, h, q, k: (ids[b, k] > 3) & (k < q + 4)
    )
    function = made.or_masks(made.causal_mask_function, ahead)
    mask = lazy_mask(batch_size=1, q_length=length, kv_length=length, mask_function=function)
    dense = mask.dense()[0, 0]
    found = edges(length, chunk, mask)
    assert found[0] == 0
    assert found[-1] == length
    for before, edge in itertools.pairwise(found):
        assert edge > before
        assert not dense[:edge, edge:].any()
        # It moved no farther than it had to.
        stops = range(min(before + chunk, length), edge)
        assert all(dense[:stop, stop:].any() for stop in stops)
    assert torch.equal(assembled(mask, found)[0, 0], dense)


def test_edges_of_a_long_sequence_take_no_evaluation() -> None:
    mask = causal(2**22)
    assert len(edges(2**22, 2**12, mask)) == 2**10 + 1
