"""The layout of kernels is the one in which matrix units read 16-bit operands."""

from __future__ import annotations

import torch

from core_fp6.layouts import execution


def test_a_lane_reads_its_columns_as_neighbours() -> None:
    column_of = execution.to_places(torch.arange(64)).view(4, 4, 4)  # lane of a quad, 16 columns
    for lane in range(4):
        for sixteen in range(4):
            first = 16 * sixteen + 2 * lane
            # Bytes 0 and 2 of a word go to the halves of one register, 1 and 3 to those of another.
            assert column_of[lane, sixteen].tolist() == [first, first + 8, first + 1, first + 9]


def test_places_and_columns_are_inverse() -> None:
    values = torch.randn(3, 2, 256)
    assert torch.equal(execution.to_columns(execution.to_places(values)), values)
