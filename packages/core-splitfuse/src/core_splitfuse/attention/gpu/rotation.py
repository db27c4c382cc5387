"""Rotation of queries and keys that come and are stored unrotated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """How the kernel turns queries and keys to their positions, in registers.

    Args:
        frequencies: (F, R / 2) float32 inverse frequencies, a line for every way of a pass: regimes
            of longrope, say. R dimensions are rotated, the first ones; the rest stays.
        lines: (S,) int32 line of every sequence.
        scales: (F,) float32 that cosines and sines are multiplied with.
        ratios: (S, H) float32 by which positions are divided, for every query head; ``None`` for 1.
        interleaved: whether neighbouring dimensions are turned with each other; by default a
            dimension of the first half is turned with that of the second.
    """

    frequencies: Tensor
    lines: Tensor
    scales: Tensor
    ratios: Tensor | None = None
    interleaved: bool = False

    @property
    def turned(self) -> int:
        """R: dimensions that are rotated."""
        return 2 * self.frequencies.shape[1]
