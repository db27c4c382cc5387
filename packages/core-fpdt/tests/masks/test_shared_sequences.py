"""The mask of a whole sequence that ranks share, made where a model sees a part of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import masking_utils as made

from core.errors import ModelError
from core_fpdt.masks import Kind, LazyMask, edges, lazy_mask

LOCAL = 6
ZEROS = torch.zeros(2, dtype=torch.long)


def local(function: Any, **arguments: Any) -> LazyMask:
    """The mask as a model makes it on a rank, where all tokens count as real."""
    ones = torch.ones(2, LOCAL, dtype=torch.bool)
    arguments = {"attention_mask": ones, **arguments}
    return lazy_mask(
        batch_size=2, q_length=LOCAL, kv_length=LOCAL, mask_function=function, **arguments
    )


def reference(documents: Tensor, kind: str, size: int) -> Tensor:
    """Pair by pair, from places inside the documents alone."""
    rows, length = documents.shape
    seen = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row in range(rows):
        ids = documents[row].tolist()
        place = [index - ids.index(ids[index]) for index in range(length)]
        for query in range(length):
            for key in range(length):
                same = ids[query] == ids[key] != -1
                back = place[query] - place[key]
                rules = {
                    "causal": back >= 0,
                    "window": 0 <= back < size,
                    "surroundings": abs(back) <= size,
                    "chunks": back >= 0 and place[query] // size == place[key] // size,
                    "everything": True,
                }
                seen[row, 0, query, key] = same and rules[kind]
    return seen


def function_of(kind: str, size: int) -> Any:
    return {
        "causal": made.causal_mask_function,
        "window": made.sliding_window_causal_mask_function(size),
        "surroundings": made.sliding_window_bidirectional_mask_function(size),
        "chunks": made.chunked_causal_mask_function(size, ZEROS),
        "everything": made.bidirectional_mask_function,
    }[kind]


@st.composite
def sequences(draw: st.DrawFn, length: int) -> Tensor:
    rows = []
    for _ in range(2):
        sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
        row = [index for index, size in enumerate(sizes) for _ in range(size)][:length]
        before = draw(st.integers(0, length - len(row)))
        rows.append([-1] * before + row + [-1] * (length - before - len(row)))
    return torch.tensor(rows)


@settings(deadline=None, max_examples=120)
@given(
    documents=sequences(18),
    kind=st.sampled_from(["causal", "window", "surroundings", "chunks", "everything"]),
    size=st.integers(1, 10),
    cuts=st.lists(st.integers(1, 17), max_size=5),
)
def test_every_rule_over_documents_and_padding(documents, kind, size, cuts) -> None:
    mask = local(function_of(kind, size)).with_documents(documents)
    assert mask.queries == mask.keys == (0, 18)
    wanted = reference(documents, kind, size)
    assert torch.equal(mask.dense(), wanted)
    bounds = sorted({0, 18, *cuts})
    for queries in itertools.pairwise(bounds):
        for keys in itertools.pairwise(bounds):
            tile, part = mask.tile(queries, keys), wanted[..., slice(*queries), slice(*keys)]
            if tile.kind == Kind.EMPTY:
                assert not part.any()
            else:
                assert torch.equal(tile.visible().expand_as(part), part)
            assert tile.kind != Kind.FULL or part.all()
    for edge in edges(18, 5, mask)[1:]:
        assert not wanted[:, :, :edge, edge:].any()


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("kind", ["causal", "window", "chunks"])
def test_documents_are_what_transformers_takes_for_packed(entry, kind, size) -> None:
    ids = torch.tensor([[0] * 7 + [1] * 2 + [2] * 9, [0] * 18])
    positions = torch.tensor([[*range(7), *range(2), *range(9)], [*range(18)]])
    create = {
        "causal": made.create_causal_mask,
        "window": made.create_sliding_window_causal_mask,
        "chunks": made.create_chunked_causal_mask,
    }[kind]
    changes = {"sliding_window": size, "attention_chunk_size": size}
    packed, wanted = entry(create, 18, 2, changes, position_ids=positions)
    mask = local(function_of(kind, size)).with_documents(ids)
    assert torch.equal(mask.dense(), wanted)
    assert torch.equal(packed.dense(), wanted)


def test_a_sequence_of_one_document_is_classified_as_ever() -> None:
    documents = torch.zeros(2, 16, dtype=torch.int32)
    documents[1, 13:] = -1
    mask = local(made.causal_mask_function).with_documents(documents)
    kinds = [mask.tile((12, 16), keys).kind for keys in ((0, 4), (12, 16))]
    assert kinds == [Kind.PARTIAL, Kind.PARTIAL], "the padding of one row sees nothing"
    assert mask.tile((8, 12), (8, 12)).kind == Kind.CAUSAL
    assert mask.tile((8, 12), (0, 4)).kind == Kind.FULL


BLOCKS = torch.tensor([[-1] * LOCAL, [-1, 0, 0, -1, -1, -1]])
HOLE = torch.tensor([[1] * LOCAL, [0] + [1] * (LOCAL - 1)]).bool()
RESTART = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
REFUSED = {
    "padding": ({"attention_mask": HOLE}, made.causal_mask_function, "padding belongs into"),
    "chunks": ({}, made.chunked_overlay(4, torch.tensor([0, 1])), "padding belongs into"),
    "packed": (
        {},
        made.packed_sequence_compatibility_function(
            made.causal_mask_function, RESTART, torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
        ),
        "position ids restart",
    ),
    "positions": (
        {},
        made.remap_positions_for_packed_sequence(made.causal_mask_function, RESTART),
        "position ids restart",
    ),
    "blocks": (
        {},
        made.or_masks(made.causal_mask_function, made.blockwise_overlay(BLOCKS)),
        "blocks that see ahead",
    ),
    "offsets": (
        {},
        made.add_offsets_to_mask_function(made.causal_mask_function, 1, 0),
        "bound to the tokens of the call",
    ),
    "unknown": ({}, lambda b, h, q, k: k <= q, r"'<lambda>' says of other tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_known_of_the_tokens_of_one_rank_is_refused(name) -> None:
    arguments, function, why = REFUSED[name]
    with pytest.raises(ModelError, match=why):
        local(function, **arguments).with_documents(torch.zeros(2, 12, dtype=torch.long))


def test_a_given_mask_is_refused() -> None:
    with pytest.raises(ModelError, match="bound to the tokens of the call"):
        LazyMask.of(torch.ones(2, 1, 4, 4).bool()).with_documents(torch.zeros(2, 8).long())


def test_what_says_nothing_is_left_out() -> None:
    nothing = made.or_masks(
        made.causal_mask_function, made.blockwise_overlay(torch.full((2, LOCAL), -1))
    )
    one = made.and_masks(nothing, made.packed_sequence_mask_function(torch.ones(2, LOCAL).long()))
    mask = local(one).with_documents(torch.zeros(2, 12, dtype=torch.long))
    assert torch.equal(mask.dense(), torch.ones(2, 1, 12, 12).tril().bool())
