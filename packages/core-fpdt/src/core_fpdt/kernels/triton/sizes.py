"""How much of a block one program has, by the shape of heads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes of one program.

    Args:
        rows: queries, a power of two from 16 on.
        columns: keys, a power of two from 16 on.
        warps: of a program.
        stages: steps that are loaded ahead, the current one included.
    """

    rows: int
    columns: int
    warps: int
    stages: int


def power_of_two(width: int) -> int:
    """The smallest power of two from 16 on that is not less: what matrix units take."""
    return max(16, 1 << (width - 1).bit_length())


def forward_sizes(width: int, itemsize: int) -> Sizes:
    """For the forward kernel.

    Args:
        width: of keys or values, the larger, as a power of two.
        itemsize: bytes of a number.
    """
    if itemsize > 2:
        # No matrix units: larger programs do not stay in registers.
        return Sizes(32, 32, 4, 2) if width <= 64 else Sizes(32, 16, 8, 1)
    return Sizes(128, 64, 8, 2) if width <= 128 else Sizes(64, 32, 8, 2)


def key_sizes(width: int, itemsize: int) -> Sizes:
    """For the kernel of gradients of keys, which has two sums in registers; as :func:`forward_sizes`."""
    if itemsize == 2 and width <= 128:
        return Sizes(32, 64, 8, 2)
    return query_sizes(width, itemsize)


def query_sizes(width: int, itemsize: int) -> Sizes:
    """For the kernel of gradients of queries; as :func:`forward_sizes`."""
    if itemsize > 2:
        return Sizes(32, 32, 8, 1) if width <= 64 else Sizes(16, 16, 8, 1)
    return Sizes(64, 64, 8, 2) if width <= 128 else Sizes(32, 32, 8, 1)
