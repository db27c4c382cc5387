"""Boxes: flat ranges, intersections and the proof that they tile, against sets of indices."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement, product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from core_ucp.view import boxes as geometry
from core_ucp.view.boxes import Boxes, flat_boxes, flat_ranges, overlaps, untiled

SHAPES = [(), (5,), (3, 4), (2, 3, 4), (1, 3, 1, 2), (0, 3), (2, 0), (2, 1, 3), (4, 1)]


def elements(shape: tuple[int, ...], boxes: Boxes) -> list[list[int]]:
    """Linear indices that every box covers, in row-major order."""
    index = np.arange(math.prod(shape)).reshape(shape)
    ends = boxes.start + boxes.size
    return [
        index[tuple(slice(a, b) for a, b in zip(first, last, strict=True))].reshape(-1).tolist()
        for first, last in zip(boxes.start.tolist(), ends.tolist(), strict=True)
    ]


@st.composite
def tables(draw: st.DrawFn, dims: int, extent: int = 9, most: int = 90) -> Boxes:
    sides = st.tuples(st.integers(0, extent), st.integers(0, extent)).map(sorted)
    rows = draw(st.lists(st.tuples(*[sides] * dims), max_size=most))
    pairs = [([a for a, _ in row], [b - a for a, b in row]) for row in rows]
    return Boxes.of(pairs, dims)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flat_ranges_are_their_elements_in_order(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    for begin, end in combinations_with_replacement(range(numel + 1), 2):
        boxes = flat_boxes(shape, begin, end)
        found = [index for box in elements(shape, boxes) for index in box]
        assert found == list(range(begin, end))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24)).map(sorted), max_size=8))
def test_many_ranges_are_those_of_one_at_a_time(ranges: list[list[int]]) -> None:
    shape = (2, 3, 4)
    begin, end = (np.array([r[i] for r in ranges], np.int64) for i in (0, 1))
    row, boxes = flat_ranges(shape, begin, end)
    single = [flat_boxes(shape, a, b) for a, b in ranges]
    assert row.tolist() == [i for i, found in enumerate(single) for _ in range(len(found))]
    assert boxes.start.tolist() == [start for found in single for start in found.start.tolist()]
    assert boxes.size.tolist() == [size for found in single for size in found.size.tolist()]


@pytest.mark.parametrize("at_once", [2**21, 50], ids=["whole", "in parts"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_overlaps_are_those_of_every_pair(at_once: int, data: st.DataObject) -> None:
    dims = data.draw(st.integers(0, 3))
    left, right = data.draw(tables(dims)), data.draw(tables(dims))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "_AT_ONCE", at_once)
        a, b, common = overlaps(left, right)
    expected = {}
    for i, j in product(range(len(left)), range(len(right))):
        start = np.maximum(left.start[i], right.start[j])
        size = np.minimum(left.end[i], right.end[j]) - start
        if (size > 0).all():
            expected[i, j] = (start.tolist(), size.tolist())
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    assert b.tolist() == sorted(b.tolist())
    found = zip(pairs, common.start.tolist(), common.size.tolist(), strict=True)
    assert {pair: (start, size) for pair, start, size in found} == expected


def cut_up(shape: tuple[int, ...], data: st.DataObject) -> Boxes:
    """Boxes that tile a tensor: it is cut in two again and again."""
    parts = [([0] * len(shape), list(shape))]
    for _ in range(data.draw(st.integers(0, 8)) if shape else 0):
        start, size = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        dim = data.draw(st.integers(0, len(shape) - 1))
        at = data.draw(st.integers(0, size[dim]))
        low, high = [*size], [*size]
        low[dim], high[dim] = at, size[dim] - at
        behind = [*start]
        behind[dim] += at
        parts += [(start, low), (behind, high)]
    return Boxes.of(data.draw(st.permutations(parts)), len(shape))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_tiling_is_one_until_a_box_is_gone_doubled_or_moved(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 8]), max_size=3)))
    boxes = cut_up(shape, data)
    assert untiled(shape, boxes) == ""
    filled = np.flatnonzero(boxes.volume > 0)
    row = int(data.draw(st.sampled_from(filled.tolist())))
    kept = np.arange(len(boxes)) != row
    assert "are missing" in untiled(shape, boxes.take(kept))
    assert "is there twice" in untiled(shape, geometry.join([boxes, boxes.take(~kept)]))
    if shape:
        moved = boxes.start.copy()
        moved[row, data.draw(st.integers(0, len(shape) - 1))] += 1
        assert untiled(shape, Boxes(moved, boxes.size)) != ""


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_untiled_says_what_counting_says(data: st.DataObject) -> None:
    shape = (4, 3)
    boxes = data.draw(tables(2, extent=4, most=5))
    counts = np.zeros((5, 5), int)
    for start, end in zip(boxes.start, boxes.end, strict=True):
        counts[start[0] : end[0], start[1] : end[1]] += 1
    inside = bool((boxes.end <= np.array(shape)).all())
    right = inside and bool((counts[:4, :3] == 1).all())
    assert (untiled(shape, boxes) == "") == right


def test_a_hole_and_an_overlap_are_named() -> None:
    rows = Boxes.of([([0, 0], [2, 4]), ([3, 0], [1, 4])], 2)
    assert untiled((4, 4), rows) == "4 of 16 elements are missing, the first in rows 2 to 2"
    double = Boxes.of([([0, 0], [3, 4]), ([2, 0], [2, 4])], 2)
    assert untiled((4, 4), double) == "[2:3, 0:4] is there twice"
    beyond = Boxes.of([([0, 0], [5, 4])], 2)
    assert untiled((4, 4), beyond) == "[0:5, 0:4] lies outside of [4, 4]"


def test_an_empty_tensor_needs_no_box() -> None:
    assert untiled((0, 3), Boxes.of([], 2)) == ""
    assert untiled((), Boxes.of([], 0)) == "1 of 1 elements are missing"
