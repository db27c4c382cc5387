"""Compositions of stock functions and functions nobody has seen before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import masking_utils as made
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.t5gemma2 import modeling_t5gemma2

from core_fpdt.masks import Kind, lazy_mask, recognise

BATCH, LENGTH = 2, 12
SEED = torch.Generator().manual_seed(3)
TABLE = torch.rand(BATCH, LENGTH, LENGTH, generator=SEED) > 0.6
IDS = torch.randint(-1, 3, (BATCH, LENGTH), generator=SEED)
SORTED = IDS.sort(1).values
PLACES = torch.tensor(
    [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 0, 1], [3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2]]
)
PACKED = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 4], [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]])


class Banded:
    """A mask function that is an object."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return ((query - key) % self.width) == 0


def prefix(length: int) -> Callable[..., Any]:
    return lambda b, h, q, k: (k <= q) | (k < length)


def windowed_by_row(sizes: torch.Tensor) -> Callable[..., Any]:
    return lambda b, h, q, k: (q - k) < sizes[b]


def inner_mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Named as transformers names its closures."""
    return key > query - 3


def shadow(sliding_window: int) -> Callable[..., Any]:
    """A closure with the name and the variables of transformers' own, and another meaning."""

    def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx > q_idx - sliding_window - 1

    return inner_mask


THEIRS: dict[str, Callable[..., Any]] = {
    "prefix": prefix(5),
    "table": lambda b, h, q, k: TABLE[b, q, k],
    "nobody": lambda b, h, q, k: q < 0,
    "everybody": lambda b, h, q, k: (q >= 0) & (k >= 0),
    "anti-causal": lambda b, h, q, k: k >= q,
    "object": Banded(3),
    "partial": partial(lambda n, b, h, q, k: (q // n) >= (k // n), 4),
    "rows": windowed_by_row(torch.tensor([2, 7])),
    "keys only": lambda b, h, q, k: IDS[b, k] >= 0,
    "queries only": lambda b, h, q, k: IDS[b, q] >= 0,
    "sinks": lambda b, h, q, k: (k < 2) | (k > q - 3),
    "same name": inner_mask,
    "same variables": shadow(3),
    "gemma3": modeling_gemma3._bidirectional_window_overlay(4),
    "t5gemma2": modeling_t5gemma2.sliding_window_mask_function(5, is_causal=False),
    "tensor window": made.sliding_window_overlay(torch.tensor(3)),
    "float window": made.sliding_window_overlay(2.5),
    "negative window": made.sliding_window_overlay(-2),
    "integer padding": made.padding_mask_function((IDS > 0).long()),
    "no packed ids": made.packed_sequence_mask_function(IDS.float()),
}
STOCK: dict[str, Callable[..., Any]] = {
    "causal": made.causal_mask_function,
    "bidirectional": made.bidirectional_mask_function,
    "window": made.sliding_window_overlay(4),
    "causal window": made.sliding_window_causal_mask_function(5),
    "surroundings": made.sliding_window_bidirectional_overlay(2),
    "chunks": made.chunked_overlay(5, torch.tensor([0, 3])),
    "causal chunks": made.chunked_causal_mask_function(4, torch.tensor([1, 6])),
    "blocks": made.blockwise_overlay(IDS),
    "rising blocks": made.blockwise_overlay(SORTED),
    "documents": made.packed_sequence_mask_function(PACKED),
    "scattered documents": made.packed_sequence_mask_function(IDS),
    "padding": made.padding_mask_function(IDS >= 0),
}


def compositions(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(parts, min_size=1, max_size=3)
    places = st.sampled_from([PLACES, PACKED, PLACES - 1])
    return st.one_of(
        several.map(lambda found: made.and_masks(*found)),
        several.map(lambda found: made.or_masks(*found)),
        st.builds(made.remap_positions_for_packed_sequence, parts, places),
        st.builds(made.packed_sequence_compatibility_function, parts, places, st.just(PACKED)),
        st.builds(made.add_offsets_to_mask_function, parts, st.integers(-2, 0), st.integers(-2, 0)),
    )


functions = st.recursive(
    st.sampled_from([*THEIRS, *STOCK]).map({**THEIRS, **STOCK}.__getitem__),
    compositions,
    max_leaves=6,
)


@settings(
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    function=functions,
    padded=st.booleans(),
    cuts=st.lists(st.integers(1, LENGTH), max_size=4),
)
def test_any_composition_equals_what_transformers_makes(
    both_ways, assembled, function, padded, cuts
) -> None:
    mask, wanted = both_ways(
        batch_size=BATCH,
        q_length=LENGTH,
        kv_length=LENGTH,
        mask_function=function,
        attention_mask=IDS >= 0 if padded else None,
    )
    assert torch.equal(mask.dense().expand_as(wanted), wanted)
    assert torch.equal(assembled(mask, cuts), wanted)
    for edge in range(1, LENGTH + 1):
        assert not wanted[:, :, :edge, mask.horizon(edge) :].any()


@pytest.mark.parametrize("ids", [PACKED, PACKED.flip(1), IDS], ids=["rising", "falling", "mixed"])
@pytest.mark.parametrize("places", [PLACES, PACKED, PLACES * 2 % LENGTH, PLACES - 1])
@pytest.mark.parametrize("name", [*STOCK, "causal or known"])
def test_positions_that_are_not_those_of_the_documents(
    both_ways, assembled, name, places, ids
) -> None:
    either = made.or_masks(made.causal_mask_function, made.padding_mask_function(IDS > 1))
    inner = {**STOCK, "causal or known": either}[name]
    function = made.packed_sequence_compatibility_function(inner, places, ids)
    mask, wanted = both_ways(
        batch_size=BATCH, q_length=LENGTH, kv_length=LENGTH, mask_function=function
    )
    assert torch.equal(assembled(mask, [2, 5, 7, 9]), wanted)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("name", THEIRS)
def test_each_function_of_others(both_ways, assembled, name, vectorized) -> None:
    mask, wanted = both_ways(
        batch_size=BATCH,
        q_length=LENGTH,
        kv_length=LENGTH,
        mask_function=made.or_masks(made.causal_mask_function, THEIRS[name]),
        use_vmap=vectorized,
    )
    assert torch.equal(assembled(mask, [1, 4, 9]), wanted)
    horizons = [max(e, *(wanted[:, :, :e].any(2).nonzero()[:, -1] + 1)) for e in range(1, LENGTH)]
    assert [mask.horizon(e) for e in range(1, LENGTH)] == horizons


def test_functions_for_single_pairs_only(both_ways, assembled) -> None:
    def rowwise(batch: Any, head: Any, query: Any, key: Any) -> Any:
        # Takes rows of a tensor: with indices that broadcast, its shapes would not fit.
        return (TABLE[batch][query] & TABLE[batch][key]).any()

    mask, wanted = both_ways(
        batch_size=BATCH, q_length=LENGTH, kv_length=LENGTH, mask_function=rowwise, use_vmap=True
    )
    assert torch.equal(assembled(mask, [5, 8]), wanted)


def test_functions_that_are_not_known_are_still_classified() -> None:
    function = made.or_masks(made.causal_mask_function, lambda b, h, q, k: (q < 3) & (k < 3))
    mask = lazy_mask(batch_size=1, q_length=12, kv_length=12, mask_function=function)
    kinds = [[mask.tile(q, k).kind for k in ((0, 4), (4, 8), (8, 12))] for q in ((0, 4), (8, 12))]
    assert kinds == [[Kind.PARTIAL, Kind.EMPTY, Kind.EMPTY], [Kind.FULL, Kind.FULL, Kind.CAUSAL]]


@pytest.fixture
def another_version(monkeypatch):
    """transformers with something changed, as the next version may be."""

    def change(name: str, value: Any) -> None:
        monkeypatch.setattr(made, name, value)
        recognise._stock.cache_clear()

    yield change
    monkeypatch.undo()
    recognise._stock.cache_clear()


def renamed(size: int) -> Callable[..., Any]:
    return lambda b, h, q, k: k > q - size


@pytest.mark.parametrize("changed", [shadow, renamed, None], ids=["meaning", "names", "gone"])
def test_another_version_of_transformers_costs_time_and_no_wrong_mask(
    another_version, both_ways, assembled, changed
) -> None:
    if changed is None:
        function = made.sliding_window_overlay(3)
        another_version("sliding_window_overlay", changed)
    else:
        another_version("sliding_window_overlay", changed)
        function = made.sliding_window_overlay(3)
    both = made.and_masks(function, made.causal_mask_function)
    mask, wanted = both_ways(batch_size=1, q_length=12, kv_length=12, mask_function=both)
    assert torch.equal(assembled(mask, [4, 8]), wanted)


def test_a_mask_that_is_composed_in_another_way_is_evaluated(another_version, assembled) -> None:
    def and_masks(*functions: Callable[..., Any]) -> Callable[..., Any]:
        def and_mask(b: Any, h: Any, q: Any, k: Any) -> Any:
            found = [function(b, h, q, k) for function in functions]
            return found[0] & ~found[1]

        return and_mask

    another_version("and_masks", and_masks)
    function = made.and_masks(made.causal_mask_function, made.sliding_window_overlay(3))
    mask = lazy_mask(batch_size=1, q_length=9, kv_length=9, mask_function=function)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    assert torch.equal(assembled(mask, [4])[0, 0], distance >= 3)
