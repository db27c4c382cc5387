"""Every chunk is shared evenly, nothing is lost, and joined pieces of a chunk are the chunk."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, strategies as st

from core_fpdt.parallel.placement import Placement

REGULAR = st.builds(
    Placement.regular,
    length=st.integers(1, 300),
    chunk=st.integers(1, 80),
    ranks=st.integers(1, 9),
)
IRREGULAR = st.builds(
    lambda sizes, ranks: Placement.of_edges([0, *accumulate(sizes)], ranks),
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 9),
)
PLACEMENTS = REGULAR | IRREGULAR


@given(PLACEMENTS)
def test_every_token_is_on_one_rank(placement: Placement) -> None:
    joined = torch.cat([placement.indices(rank) for rank in range(placement.ranks)])
    assert joined.sort().values.equal(torch.arange(placement.length))
    assert joined[placement.inverse].equal(torch.arange(placement.length))


@given(PLACEMENTS)
def test_ranks_differ_by_one_token_of_a_chunk_at_most(placement: Placement) -> None:
    for chunk in range(placement.chunks):
        pieces = placement.pieces(chunk)
        assert sum(pieces) == placement.edges[chunk + 1] - placement.edges[chunk]
        assert max(pieces) - min(pieces) <= 1


@given(PLACEMENTS)
def test_pieces_of_a_chunk_in_the_order_of_ranks_are_the_chunk(placement: Placement) -> None:
    own = [placement.indices(rank) for rank in range(placement.ranks)]
    edges = [placement.local_edges(rank) for rank in range(placement.ranks)]
    assert {len(one) for one in edges} == {placement.chunks + 1}
    for chunk in range(placement.chunks):
        pieces = [o[e[chunk] : e[chunk + 1]] for o, e in zip(own, edges, strict=True)]
        assert [len(piece) for piece in pieces] == placement.pieces(chunk)
        whole = torch.arange(placement.edges[chunk], placement.edges[chunk + 1])
        assert torch.cat(pieces).equal(whole)


@given(REGULAR)
def test_a_rank_keeps_its_tokens_in_their_order(placement: Placement) -> None:
    for rank in range(placement.ranks):
        own = placement.indices(rank)
        assert own.equal(own.sort().values)
        assert placement.local_edges(rank)[-1] == len(own)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7))
def test_a_length_that_divides_is_placed_as_the_paper_does(u: int, c: int, ranks: int) -> None:
    length = u * c * ranks
    placement = Placement.regular(length, c * ranks, ranks)
    for rank in range(ranks):
        expected = torch.arange(length).view(u, ranks, c)[:, rank].reshape(-1)
        assert placement.indices(rank).equal(expected)


@pytest.mark.parametrize("edges", [[], [0], [1, 2], [0, 4, 4], [0, 5, 3]])
def test_edges_that_do_not_rise_from_0_are_refused(edges: list[int]) -> None:
    with pytest.raises(ValueError, match="rise from 0"):
        Placement.of_edges(edges)


@pytest.mark.parametrize(("length", "chunk"), [(0, 4), (4, 0), (-1, 4)])
def test_nothing_cannot_be_placed(length: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        Placement.regular(length, chunk)


def test_a_sequence_needs_a_rank() -> None:
    with pytest.raises(ValueError, match="0 ranks"):
        Placement.regular(4, 4, 0)
