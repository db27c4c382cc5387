"""What is written is what is read, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from core_splitfuse.attention.gpu import copy_blocks, write


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(0, 12),
    heads=st.sampled_from([1, 2, 3, 8]),
    dims=st.sampled_from([(8, 8), (24, 16), (16, 40)]),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_tokens_go_to_their_slots(tokens, heads, dims, transposed, dtype, data) -> None:
    keys = torch.randn(3, 16, heads, dims[0]).to(dtype)
    values = torch.randn(3, 16, heads, dims[1]).to(dtype)
    free = data.draw(st.permutations(range(48)))
    slots = [data.draw(st.sampled_from([free[i], -1])) for i in range(tokens)]
    shape = (heads, tokens) if transposed else (tokens, heads)
    key, value = (torch.randn(*shape, dim).to(dtype) for dim in dims)
    if transposed:
        key, value = key.transpose(0, 1), value.transpose(0, 1)
    wanted = keys.clone().flatten(0, 1), values.clone().flatten(0, 1)
    for token, slot in enumerate(slots):
        if slot >= 0:
            wanted[0][slot], wanted[1][slot] = key[token], value[token]
    write(keys, values, key, value, torch.tensor(slots, dtype=torch.int32))
    assert torch.equal(keys.flatten(0, 1), wanted[0])
    assert torch.equal(values.flatten(0, 1), wanted[1])


def test_numbers_may_have_gaps() -> None:
    keys, values = torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8)
    key, value = torch.randn(8, 3, 2).transpose(0, 2), torch.randn(8, 3, 2).transpose(0, 2)
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    write(keys, values, key, value, torch.tensor([5, 0, 9], dtype=torch.int32))
    assert torch.equal(keys[0, [5, 0, 9]], key)
    assert torch.equal(values[0, [5, 0, 9]], value)


@pytest.mark.parametrize("pairs", [[], [(0, 4)], [(1, 3), (1, 4), (0, 2)]])
def test_blocks_are_copied(pairs: list[tuple[int, int]]) -> None:
    store = torch.randn(5, 16, 3, 24).bfloat16()
    wanted = store.clone()
    for old, new in pairs:
        wanted[new] = store[old]
    copy_blocks(store, pairs)
    assert torch.equal(store, wanted)


@pytest.mark.parametrize(
    "pairs", [[(0, 1), (1, 2)], [(0, 2), (1, 2)], [(0, 5)], [(-1, 2)], [(3, 3)]]
)
def test_copies_that_make_no_sense_are_refused(pairs: list[tuple[int, int]]) -> None:
    store = torch.randn(5, 16, 1, 8)
    before = store.clone()
    with pytest.raises(ValueError, match="block"):
        copy_blocks(store, pairs)
    assert torch.equal(store, before)


def test_a_store_that_would_be_misread_is_refused() -> None:
    key = torch.randn(1, 2, 8)
    slots = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="power of two"):
        write(torch.zeros(2, 24, 2, 8), torch.zeros(2, 24, 2, 8), key, key, slots)
    with pytest.raises(ValueError, match="do not fit a store"):
        write(torch.zeros(2, 16, 2, 16), torch.zeros(2, 16, 2, 16), key, key, slots)
