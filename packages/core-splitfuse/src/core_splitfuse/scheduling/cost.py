"""What a forward pass costs, learned while serving, and the budget that keeps a time limit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_FORGET = 0.99
"""Weight of what was known before, for each new measurement."""
_UNKNOWN = 1e6
"""Variance of coefficients that nothing is known of, in units of their own."""
_UNITS = np.array([1e-2, 1e-4, 1e-7, 1e-5])
"""Seconds that a pass, a token, a key-value token read and a sequence roughly cost."""


@dataclass(frozen=True)
class Load:
    """What a forward pass has to do.

    Args:
        tokens: tokens that are computed.
        context: tokens whose keys and values are read.
        sequences: sequences they are of.
    """

    tokens: int
    context: int
    sequences: int


@dataclass
class CostModel:
    """Seconds of a forward pass: ``max(a0, a1 * tokens) + a2 * context + a3 * sequences``.

    Below the knee a pass costs what reading the weights costs, above it what the arithmetic does
    (DeepSpeed-FastGen, arXiv 2401.08671, section 3). The coefficients are fitted by recursive least
    squares with forgetting, in the branch that each measurement falls into.
    """

    coefficients: Vector = field(default_factory=lambda: np.zeros(4))
    measured: int = 0
    _covariance: NDArray[np.float64] = field(default_factory=lambda: np.eye(4) * _UNKNOWN)

    def seconds(self, load: Load) -> float:
        """Predicted duration."""
        fixed, token, context, sequence = np.maximum(self.coefficients, 0) * _UNITS
        arithmetic = max(fixed, token * load.tokens)
        return float(arithmetic + context * load.context + sequence * load.sequences)

    def learn(self, load: Load, seconds: float) -> None:
        """Take a measurement into account."""
        row = self._row(load)
        gain = self._covariance @ row / (_FORGET + row @ self._covariance @ row)
        self.coefficients = self.coefficients + gain * (seconds - row @ self.coefficients)
        shrunk = self._covariance - np.outer(gain, row @ self._covariance)
        # Rounding would make it lopsided in time.
        shrunk = (shrunk + shrunk.T) / 2
        # What no measurement touches would be forgotten without end.
        grown = shrunk / _FORGET
        self._covariance = grown if np.trace(grown) <= len(row) * _UNKNOWN else shrunk
        self.measured += 1

    def most_tokens(self, limit: float, load: Load, most: int) -> int:
        """The most tokens, up to ``most``, that a pass may add to ``load`` within ``limit`` seconds."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            more = Load(load.tokens + middle, load.context, load.sequences)
            low, high = (middle, high) if self.seconds(more) <= limit else (low, middle - 1)
        return low

    def _row(self, load: Load) -> Vector:
        fixed, token = np.maximum(self.coefficients[:2], 0) * _UNITS[:2]
        known = fixed > 0 and token > 0
        bound = fixed > token * load.tokens if known else load.tokens < 32
        row = np.array([bound, 0 if bound else load.tokens, load.context, load.sequences], float)
        scaled: Vector = row * _UNITS
        return scaled
