"""Attention over keys and values in blocks: one program per atom and key head (flash-decoding).

An atom is up to a tile's number of tokens of one sequence; the rows of a program are those tokens
times the query heads that share a key head. It walks along the block table with an online softmax
in base two. Where few programs would be busy, several share the keys of an atom, each leaves its
part with the logarithm of its weight, and a second kernel merges the parts exactly.
"""

# ruff: noqa: N803 (what is known when a kernel is compiled is in capitals)
# Which branches there are is known then, too.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from core_splitfuse.attention.gpu.language import (
    constexpr,
    cosine,
    jit,
    kernel,
    offset_of,
    product,
    rounded,
    sine,
    tensor,
    tl,
)

LOG2E = tl.constexpr(1.4426950408889634)

FIELDS = 8
"""int32 numbers of an atom: sequence, row, tokens, position, split, splits, place of its parts."""
MERGE_FIELDS = 4
"""int32 numbers of a merge: row, place of its first part, distance to the next, parts."""

_FIELDS = tl.constexpr(FIELDS)
_MERGE_FIELDS = tl.constexpr(MERGE_FIELDS)


@jit
def _tanh(x: tensor) -> tensor:
    small = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    size = (1 - small) / (1 + small)
    # Near zero the difference above has lost its digits.
    square = x * x
    series = tl.abs(x) * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    size = tl.where(tl.abs(x) < 0.1, series, size)
    return tl.where(x < 0, -size, size)


@jit
def _angles(
    position: tensor, ratio: tensor, frequency: tensor, scale: tensor
) -> tuple[tensor, tensor]:
    """Scaled cosines and sines ``[positions, pairs]``."""
    angle = tl.div_rn(position.to(tl.float32), ratio)[:, None] * frequency[None, :]
    return cosine(angle) * scale, sine(angle) * scale


@jit
def _turned(first: tensor, second: tensor, cos: tensor, sin: tensor) -> tuple[tensor, tensor]:
    """Both halves of pairs, turned."""
    one, two = first.to(tl.float32), second.to(tl.float32)
    return (
        rounded(one * cos - two * sin, first.dtype),
        rounded(two * cos + one * sin, second.dtype),
    )


@jit
def _keys_of(
    position: tensor,
    count: tensor,
    split: tensor,
    splits: tensor,
    window: tensor,
    WINDOW: constexpr,
    KEYS: constexpr,
) -> tuple[tensor, tensor]:
    """First key of a program and one past its last; whole steps of a table, none for padding."""
    end = position + count
    begin = 0
    if WINDOW:
        begin = tl.maximum(position + 1 - window, 0) // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(end - begin, KEYS), splits) * KEYS
    begin += split * share
    return begin, tl.minimum(end, begin + share)


@jit
def _dims_of(pair: tensor, TURNED: constexpr, INTERLEAVED: constexpr) -> tuple[tensor, tensor]:
    """The two dimensions of a pair."""
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    return pair, pair + TURNED // 2


@jit
def _slots_of(
    table: tensor, start: tensor, column: tensor, inside: tensor, BLOCK: constexpr, KEYS: constexpr
) -> tensor:
    """Where the store has some neighbouring keys."""
    if KEYS <= BLOCK:
        return offset_of(tl.load(table + start // BLOCK), BLOCK) + column % BLOCK
    blocks = tl.load(table + column // BLOCK, mask=inside, other=0)
    return offset_of(blocks, BLOCK) + column % BLOCK


@jit
def _scored(
    scores: tensor,
    column: tensor,
    at: tensor,
    scaling: tensor,
    softcap: tensor,
    window: tensor,
    WINDOW: constexpr,
    SOFTCAP: constexpr,
) -> tensor:
    """Products to exponents of two; what is not seen gets minus infinity."""
    if SOFTCAP:
        scores = _tanh(scores * (scaling / softcap)) * (softcap * LOG2E)
    else:
        scores *= scaling * LOG2E
    seen = column[None, :] <= at[:, None]
    if WINDOW:
        seen &= column[None, :] > at[:, None] - window
    return tl.where(seen, scores, float("-inf"))


@jit
def _sunk(
    sink_ptr: tensor, head: tensor, live: tensor, split: tensor, ROWS: constexpr, SINKS: constexpr
) -> tuple[tensor, tensor]:
    """Largest exponent and total before any key: a sink is a key without a value."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:
        sink = tl.load(sink_ptr + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        # The first of several programs counts it.
        top = tl.where(split == 0, sink, top)
        total = tl.where(split == 0, 1.0, total)
    return top, total


@kernel("table_stride")
def attend_kernel(
    query_ptr: tensor,
    key_ptr: tensor,
    value_ptr: tensor,
    out_ptr: tensor,
    part_ptr: tensor,
    weight_ptr: tensor,
    table_ptr: tensor,
    atom_ptr: tensor,
    sink_ptr: tensor,
    frequency_ptr: tensor,
    frequency_row_ptr: tensor,
    frequency_scale_ptr: tensor,
    ratio_ptr: tensor,
    scaling: tensor,
    softcap: tensor,
    window: tensor,
    table_stride: tensor,
    query_stride: tensor,
    query_head_stride: tensor,
    GROUP: constexpr,
    KEY_HEADS: constexpr,
    DIM: constexpr,
    VALUE_DIM: constexpr,
    BLOCK: constexpr,
    WINDOW: constexpr,
    SOFTCAP: constexpr,
    SINKS: constexpr,
    TURNED: constexpr,
    INTERLEAVED: constexpr,
    RATIOS: constexpr,
    ROWS: constexpr,
    HEADS: constexpr,
    KEYS: constexpr,
    PAIRS: constexpr,
    WIDTH: constexpr,
    VALUE_WIDTH: constexpr,
    PRECISION: constexpr,
) -> None:
    """One atom and some query heads of one key head."""
    atom = atom_ptr + tl.program_id(0) * _FIELDS
    count = tl.load(atom + 2)
    if count == 0:
        return
    sequence, first_row, position = tl.load(atom), tl.load(atom + 1), tl.load(atom + 3)
    split, splits, place = tl.load(atom + 4), tl.load(atom + 5), tl.load(atom + 6)

    tiles: constexpr = (GROUP + HEADS - 1) // HEADS
    key_head = tl.program_id(1) // tiles
    row = tl.arange(0, ROWS)
    token = row // HEADS
    in_group = (tl.program_id(1) % tiles) * HEADS + row % HEADS
    head = key_head * GROUP + in_group
    live = (token < count) & (in_group < GROUP)
    at = position + token
    dim, value_dim = TURNED + tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)

    begin, end = _keys_of(position, count, split, splits, window, WINDOW, KEYS)
    query_at = query_ptr + (
        offset_of(first_row + token, query_stride) + offset_of(head, query_head_stride)
    )
    if TURNED < DIM:
        resting = dim < DIM
        query = tl.load(query_at[:, None] + dim, mask=live[:, None] & resting, other=0.0)
    if TURNED:
        pair = tl.arange(0, PAIRS)
        paired = pair < TURNED // 2
        # Both dimensions of a pair turn together, and go into different products.
        one, two = _dims_of(pair, TURNED, INTERLEAVED)
        way = tl.load(frequency_row_ptr + sequence)
        scale = tl.load(frequency_scale_ptr + way)
        frequency = tl.load(frequency_ptr + way * (TURNED // 2) + pair, mask=paired, other=0.0)
        ratio = 1.0
        if RATIOS:
            # A program has one head here: keys are turned by its ratio.
            only = key_head * GROUP + (tl.program_id(1) % tiles) * HEADS
            ratio = tl.load(ratio_ptr + sequence * (GROUP * KEY_HEADS) + only)
        loaded = live[:, None] & paired
        query_one = tl.load(query_at[:, None] + one, mask=loaded, other=0.0)
        query_two = tl.load(query_at[:, None] + two, mask=loaded, other=0.0)
        cos, sin = _angles(at, ratio, frequency, scale)
        query_one, query_two = _turned(query_one, query_two, cos, sin)

    top, total = _sunk(sink_ptr, head, live, split, ROWS, SINKS)
    sums = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    table = table_ptr + offset_of(sequence, table_stride)

    for start in range(begin, end, KEYS):
        column = start + tl.arange(0, KEYS)
        inside = column < end
        slot = _slots_of(table, start, column, inside, BLOCK, KEYS)
        line = slot * KEY_HEADS + key_head
        key_at = key_ptr + line[:, None] * DIM
        scores = tl.zeros((ROWS, KEYS), tl.float32)
        if TURNED < DIM:
            key = tl.load(key_at + dim, mask=inside[:, None] & resting, other=0.0)
            scores += product(query, tl.trans(key), PRECISION)
        if TURNED:
            found = inside[:, None] & paired
            key_one = tl.load(key_at + one, mask=found, other=0.0)
            key_two = tl.load(key_at + two, mask=found, other=0.0)
            cos_of_keys, sin_of_keys = _angles(column, ratio, frequency, scale)
            key_one, key_two = _turned(key_one, key_two, cos_of_keys, sin_of_keys)
            scores += product(query_one, tl.trans(key_one), PRECISION)
            scores += product(query_two, tl.trans(key_two), PRECISION)
        scores = _scored(scores, column, at, scaling, softcap, window, WINDOW, SOFTCAP)
        highest = tl.maximum(top, tl.max(scores, 1))
        # A row that has not seen a key yet must not compute inf - inf.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(weights, 1)
        # What a slot behind the end holds may be no number.
        value_at = value_ptr + line[:, None] * VALUE_DIM
        value = tl.load(
            value_at + value_dim, mask=inside[:, None] & (value_dim < VALUE_DIM), other=0.0
        )
        weights = rounded(weights, value_ptr.dtype.element_ty)
        sums = sums * keep[:, None] + product(weights, value, PRECISION)
        top = highest

    # Nothing was seen where the total is zero: by padding, or by a split behind the window.
    whole = tl.where(total == 0, 1.0, total)
    out = sums / whole[:, None]
    stored = live[:, None] & (value_dim < VALUE_DIM)
    if splits == 1:
        out_at = offset_of(first_row + token, GROUP * KEY_HEADS) + head
        tl.store(
            out_ptr + out_at[:, None] * VALUE_DIM + value_dim,
            rounded(out, out_ptr.dtype.element_ty),
            mask=stored,
        )
    else:
        part_at = offset_of(place + token, GROUP * KEY_HEADS) + head
        tl.store(part_ptr + part_at[:, None] * VALUE_DIM + value_dim, out, mask=stored)
        tl.store(weight_ptr + part_at, top + tl.log2(whole), mask=live)


@kernel()
def merge_kernel(
    part_ptr: tensor,
    weight_ptr: tensor,
    out_ptr: tensor,
    merge_ptr: tensor,
    HEADS: constexpr,
    VALUE_DIM: constexpr,
    VALUE_WIDTH: constexpr,
) -> None:
    """One token and head: its parts, weighted by their sums of exponentials."""
    merge = merge_ptr + tl.program_id(0) * _MERGE_FIELDS
    parts = tl.load(merge + 3)
    if parts == 0:
        return
    row, place, step = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
    head = tl.program_id(1)
    dim = tl.arange(0, VALUE_WIDTH)
    top = float("-inf")
    total = 0.0
    sums = tl.zeros((VALUE_WIDTH,), tl.float32)
    for index in range(parts):
        at = offset_of(place + index * step, HEADS) + head
        weight = tl.load(weight_ptr + at)
        part = tl.load(part_ptr + at * VALUE_DIM + dim, mask=dim < VALUE_DIM, other=0.0)
        highest = tl.maximum(top, weight)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        keep, gain = tl.exp2(top - base), tl.exp2(weight - base)
        total = total * keep + gain
        sums = sums * keep + part * gain
        top = highest
    out = rounded(sums / tl.where(total == 0, 1.0, total), out_ptr.dtype.element_ty)
    at = offset_of(row, HEADS) + head
    tl.store(out_ptr + at * VALUE_DIM + dim, out, mask=dim < VALUE_DIM)
