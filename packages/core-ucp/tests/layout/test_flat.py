"""Flat buffers of ZeRO: what ranks hold, and where, against buffers that are really built."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from core.errors import CheckpointError
from core_ucp.layout.flat import FlatGroup, FlatParam, Span
from core_ucp.view.boxes import untiled
from core_ucp.view.pieces import Pieces

SHAPES = st.lists(
    st.lists(st.sampled_from([0, 1, 2, 3, 5, 7]), max_size=3).map(tuple), min_size=1, max_size=6
)


def tensors(shapes: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors whose elements are all different."""
    made, first = {}, 0
    for index, shape in enumerate(shapes):
        made[f"p{index}"] = np.arange(first, first + math.prod(shape)).reshape(shape)
        first += math.prod(shape)
    return made


def check(
    state: dict[str, np.ndarray], pieces: dict[str, Pieces], buffers: list[np.ndarray]
) -> None:
    for name, tensor in state.items():
        assert untiled(tensor.shape, pieces[name].boxes) == ""
        for row, (start, end) in enumerate(
            zip(pieces[name].boxes.start, pieces[name].boxes.end, strict=True)
        ):
            box = tuple(slice(a, b) for a, b in zip(start, end, strict=True))
            steps = tuple(int(step) for step in pieces[name].stride[row])
            held = buffers[int(pieces[name].file[row])].data
            found = np.ndarray(
                tensor[box].shape, np.int64, held, int(pieces[name].offset[row]), steps
            )
            assert (found == tensor[box]).all()


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(1, 5), st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 8]))
def test_a_group_is_one_padded_vector(
    shapes: list[tuple[int, ...]], ranks: int, align: int, each: int
) -> None:
    state = tensors(shapes)
    flat: list[int] = []
    for tensor in state.values():
        flat += [-1] * (-len(flat) % each)
        flat += tensor.reshape(-1).tolist()
    flat += [-1] * (-len(flat) % (align * ranks))
    buffers = np.split(np.array(flat, np.int64), ranks)
    spans = FlatGroup(tuple(state), align, each).spans({n: t.size for n, t in state.items()}, ranks)
    assert spans.length.tolist() == [len(buffer) for buffer in buffers]
    assert spans.padding.tolist() == [int((buffer == -1).sum()) for buffer in buffers]
    files, zero = np.arange(ranks), np.zeros(ranks, np.int64)
    pieces = spans.pieces({n: t.shape for n, t in state.items()}, files, zero, 8)
    check(state, pieces, buffers)


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(1, 5))
def test_a_parameter_of_stage_three_is_cut_by_itself(
    shapes: list[tuple[int, ...]], ranks: int
) -> None:
    state = tensors(shapes)
    columns: list[list[int]] = [[] for _ in range(ranks)]
    for tensor in state.values():
        part = -(-tensor.size // ranks)
        padded = [*tensor.reshape(-1).tolist(), *[-1] * (part * ranks - tensor.size)]
        for rank in range(ranks):
            columns[rank] += padded[rank * part : (rank + 1) * part]
    buffers = [np.array(column, np.int64) for column in columns]
    spans = FlatParam(tuple(state)).spans({n: t.size for n, t in state.items()}, ranks)
    assert spans.length.tolist() == [len(buffer) for buffer in buffers]
    assert spans.padding.tolist() == [int((buffer == -1).sum()) for buffer in buffers]
    files, zero = np.arange(ranks), np.zeros(ranks, np.int64)
    pieces = spans.pieces({n: t.shape for n, t in state.items()}, files, zero, 8)
    check(state, pieces, buffers)
    for rank, buffer in enumerate(buffers):
        for span in spans.of(rank):
            elements = state[span.parameter].reshape(-1)[span.begin : span.end]
            assert buffer[span.place : span.place + len(elements)].tolist() == elements.tolist()


def test_spans_of_a_rank_are_listed_in_the_order_of_its_buffer() -> None:
    spans = FlatGroup(("b", "a")).spans({"a": 5, "b": 4}, 2)
    assert spans.of(0) == [Span("b", 0, 4, 0), Span("a", 0, 2, 4)]
    assert spans.of(1) == [Span("a", 2, 5, 0)]
    assert spans.padding.tolist() == [0, 3]


def test_an_order_of_other_parameters_is_refused() -> None:
    with pytest.raises(CheckpointError, match="does not hold b exactly once"):
        FlatGroup(("a",)).spans({"a": 5, "b": 4}, 2)
    with pytest.raises(CheckpointError, match="does not hold a exactly once"):
        FlatParam(("a", "a")).spans({"a": 5}, 2)
