"""Keys and values into their slots, and copies of whole blocks."""

# ruff: noqa: N803 (what is known when a kernel is compiled is in capitals)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core_splitfuse.attention.gpu.language import (
    OPTIONS,
    constexpr,
    kernel,
    made_current,
    offset_of,
    tensor,
    tl,
    triton,
)

_COPIED = 1024
"""Numbers that a program copies."""


@kernel()
def write_kernel(
    key_ptr: tensor,
    value_ptr: tensor,
    keys_ptr: tensor,
    values_ptr: tensor,
    slot_ptr: tensor,
    key_stride: tensor,
    key_head_stride: tensor,
    value_stride: tensor,
    value_head_stride: tensor,
    KEY_HEADS: constexpr,
    DIM: constexpr,
    VALUE_DIM: constexpr,
    HEADS: constexpr,
    WIDTH: constexpr,
) -> None:
    """Key and value of one token, all heads."""
    token = tl.program_id(0)
    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    head = tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, WIDTH)[None, :]
    line = offset_of(slot, KEY_HEADS) + head
    inside = (head < KEY_HEADS) & (dim < DIM)
    source = offset_of(token, key_stride) + head * key_head_stride + dim
    tl.store(keys_ptr + line * DIM + dim, tl.load(key_ptr + source, mask=inside), mask=inside)
    inside = (head < KEY_HEADS) & (dim < VALUE_DIM)
    source = offset_of(token, value_stride) + head * value_head_stride + dim
    line = line * VALUE_DIM + dim
    tl.store(values_ptr + line, tl.load(value_ptr + source, mask=inside), mask=inside)


@kernel()
def copy_kernel(store_ptr: tensor, pair_ptr: tensor, SIZE: constexpr, COUNT: constexpr) -> None:
    """A part of one block."""
    pair = pair_ptr + tl.program_id(0) * 2
    old, new = tl.load(pair), tl.load(pair + 1)
    place = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    inside = place < SIZE
    content = tl.load(store_ptr + offset_of(old, SIZE) + place, mask=inside)
    tl.store(store_ptr + offset_of(new, SIZE) + place, content, mask=inside)


def write(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Keep the keys and values of tokens.

    Args:
        keys: (blocks, block_size, Hkv, D), without gaps; written.
        values: (blocks, block_size, Hkv, Dv), without gaps; written.
        key: (T, Hkv, D), any strides.
        value: (T, Hkv, Dv), any strides.
        slots: (T,) int32, ``block * block_size + offset`` of every token; those of padding are
            negative and nothing is written for them. No slot may come twice.
    """
    require_store(keys, values)
    tokens, heads, dim = key.shape
    if (heads, dim) != keys.shape[2:] or value.shape != (tokens, heads, values.shape[3]):
        shapes = f"{tuple(key.shape)} and {tuple(value.shape)}"
        raise ValueError(f"{shapes} do not fit a store of {tuple(keys.shape)}")
    if not tokens:
        return
    key, value = _dense(key), _dense(value)
    with made_current(keys):
        write_kernel[(tokens,)](
            key,
            value,
            keys,
            values,
            slots,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            KEY_HEADS=heads,
            DIM=dim,
            VALUE_DIM=values.shape[3],
            HEADS=triton.next_power_of_2(heads),
            WIDTH=triton.next_power_of_2(max(dim, values.shape[3])),
            **OPTIONS,
        )


def copy_blocks(store: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy blocks of keys or of values.

    Args:
        store: (blocks, block_size, ...), without gaps.
        pairs: block to read and block to write; what is written is neither read nor written by
            another pair, because all are copied at once.

    Raises:
        ValueError: for pairs that depend on each other, or blocks that are not there.
    """
    if not pairs:
        return
    new = {pair[1] for pair in pairs}
    if len(new) != len(pairs) or any(old in new for old, _ in pairs):
        raise ValueError(f"blocks cannot be copied at once: {list(pairs)}")
    if not all(0 <= block < store.shape[0] for pair in pairs for block in pair):
        raise ValueError(f"{list(pairs)} are not all among {store.shape[0]} blocks")
    size = store[0].numel()
    table = torch.tensor(pairs, dtype=torch.int32)
    if store.is_cuda:
        table = table.pin_memory().to(store.device, non_blocking=True)
    grid = len(pairs), triton.cdiv(size, _COPIED)
    with made_current(store):
        copy_kernel[grid](store, table, SIZE=size, COUNT=_COPIED, **OPTIONS)


def require_store(keys: Tensor, values: Tensor) -> None:
    """Refuse a store that kernels would misread."""
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError("the store must be without gaps")
    if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        shapes = f"{tuple(keys.shape)} and {tuple(values.shape)}"
        raise ValueError(f"keys and values do not fit together: {shapes}")
    if keys.shape[1] < 16 or keys.shape[1] & (keys.shape[1] - 1):
        raise ValueError(f"{keys.shape[1]} tokens in a block are no power of two from 16 on")


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
