"""Rows are split among writers: each row once, evenly in bytes, and always in the same way."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, strategies as st

from core.errors import CheckpointError
from core_fastpersist.dcp.rows import Run, ends, split

TENSORS = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.integers(0, 9), st.sampled_from([64, 1000, 4096]))),
    max_size=12,
)
WRITERS = st.integers(1, 20)


def parted(tensors: list[tuple[int, int]], writers: int) -> list[list[Run]]:
    return split([rows for rows, _ in tensors], [width for _, width in tensors], writers)


@given(TENSORS, WRITERS)
@example([(1, 5)], 8)
@example([(3, 0), (0, 7)], 3)
def test_every_row_is_written_once(tensors: list[tuple[int, int]], writers: int) -> None:
    runs = parted(tensors, writers)
    assert len(runs) == writers
    written = [
        (run.tensor, row)
        for run in itertools.chain(*runs)
        for row in range(run.first, run.first + run.count)
    ]
    everything = [(tensor, row) for tensor, (rows, _) in enumerate(tensors) for row in range(rows)]
    assert sorted(written) == everything


@given(TENSORS, WRITERS)
@example([(2, 2), (1, 1)], 2)  # five bytes: ideal ranges of three and two
def test_writers_differ_by_at_most_the_widest_row(
    tensors: list[tuple[int, int]], writers: int
) -> None:
    loads = [
        sum(run.count * tensors[run.tensor][1] for run in runs) for runs in parted(tensors, writers)
    ]
    widest = max((width for rows, width in tensors if rows), default=0)
    assert max(loads) - min(loads) <= widest


@given(TENSORS, WRITERS)
def test_neighbouring_rows_are_one_run_and_runs_are_in_order(
    tensors: list[tuple[int, int]], writers: int
) -> None:
    for runs in parted(tensors, writers):
        assert runs == sorted(runs)
        for before, after in itertools.pairwise(runs):
            assert before.tensor < after.tensor or before.first + before.count < after.first


@given(TENSORS, WRITERS)
def test_the_same_tensors_are_split_in_the_same_way(
    tensors: list[tuple[int, int]], writers: int
) -> None:
    assert parted(tensors, writers) == parted(list(tensors), writers)


@given(TENSORS, WRITERS)
def test_tensors_without_bytes_are_whole_with_the_first_writer(
    tensors: list[tuple[int, int]], writers: int
) -> None:
    first, *others = parted(tensors, writers)
    for tensor, (rows, width) in enumerate(tensors):
        if rows * width == 0:
            assert Run(tensor, 0, rows) in first
            assert all(run.tensor != tensor for run in itertools.chain(*others))


@given(TENSORS, WRITERS)
def test_few_rows_lie_outside_the_ideal_range_of_their_writer(
    tensors: list[tuple[int, int]], writers: int
) -> None:
    begins = [0, *itertools.accumulate(rows * width for rows, width in tensors)]
    bounds = [0, *ends(begins[-1], writers)]
    outside = 0
    for writer, runs in enumerate(parted(tensors, writers)):
        low, high = bounds[writer], bounds[writer + 1]
        for run in runs:
            width = tensors[run.tensor][1]
            for row in range(run.first, run.first + run.count):
                start = begins[run.tensor] + row * width
                outside += width > 0 and not (low <= start and start + width <= high)
    assert outside <= writers - 1


@given(st.integers(0, 10**15), st.integers(1, 2000))
def test_ideal_ranges_differ_by_one_byte_the_first_being_larger(total: int, writers: int) -> None:
    found = [0, *ends(total, writers)]
    sizes = [after - before for before, after in itertools.pairwise(found)]
    assert found[-1] == total
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_a_row_of_any_number_is_as_good_as_few() -> None:
    whole = split([10**12, 7], [3, 10**10], 1024)
    loads = [sum(run.count * [3, 10**10][run.tensor] for run in runs) for runs in whole]
    assert sum(loads) == 3 * 10**12 + 7 * 10**10
    assert max(loads) - min(loads) <= 10**10
    assert sum(map(len, whole)) <= 2 + 2 * 1024


def test_many_tensors_are_split_among_many_writers() -> None:
    rows = [(index * 7919) % 4099 + 1 for index in range(100_000)]
    widths = [2 << index % 12 for index in range(100_000)]
    parts = split(rows, widths, 1024)
    loads = [sum(run.count * widths[run.tensor] for run in runs) for runs in parts]
    assert sum(loads) == sum(map(int.__mul__, rows, widths))
    assert max(loads) - min(loads) <= 4096
    assert sum(map(len, parts)) <= 100_000 + 2 * 1024


@pytest.mark.parametrize(
    ("rows", "widths", "writers"),
    [([1], [1], 0), ([1, 2], [1], 2), ([-1], [1], 2), ([1], [-1], 2)],
)
def test_nonsense_is_refused(rows: list[int], widths: list[int], writers: int) -> None:
    with pytest.raises(CheckpointError, match="cannot be split"):
        split(rows, widths, writers)
