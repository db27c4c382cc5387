"""The baseline of the quickstart: an interpolated trigram model, counted on the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

Counts = np.ndarray[Any, np.dtype[np.int64]]


class Trigram:
    """Trigram model with Witten-Bell interpolation down to the unigram (Bell et al., 1990).

    Args:
        tokens: (sequences, length) ids to count; sequences do not run into each other.
        vocabulary: number of token ids.
    """

    def __init__(self, tokens: Tensor, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        ids = tokens.numpy()
        one = np.bincount(ids.ravel(), minlength=vocabulary) + 1.0
        self._unigram = one / one.sum()
        self._bigrams = _Table(ids[:, :-1], ids[:, 1:], vocabulary)
        self._trigrams = _Table(self._pair(ids[:, :-2], ids[:, 1:-1]), ids[:, 2:], vocabulary)

    def loss(self, tokens: Tensor) -> float:
        """Mean loss of (sequences, length) ids in nats per token, first tokens left out."""
        ids = tokens.numpy()
        second = self._bigrams.interpolate(ids[:, :1], ids[:, 1:2], self._unigram[ids[:, 1:2]])
        lower = self._bigrams.interpolate(ids[:, 1:-1], ids[:, 2:], self._unigram[ids[:, 2:]])
        contexts = self._pair(ids[:, :-2], ids[:, 1:-1])
        rest = self._trigrams.interpolate(contexts, ids[:, 2:], lower)
        return float(-np.log(np.concatenate([second, rest], axis=1)).mean())

    def _pair(self, first: Counts, second: Counts) -> Counts:
        return first.astype(np.int64) * self._vocabulary + second


class _Table:
    """Counts of a context followed by a token, as sorted arrays."""

    def __init__(self, contexts: Counts, tokens: Counts, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._keys, self._counts = np.unique(self._key(contexts, tokens), return_counts=True)
        self._contexts, self._totals = np.unique(contexts.ravel(), return_counts=True)
        _, self._kinds = np.unique(self._keys // vocabulary, return_counts=True)

    def interpolate(self, contexts: Counts, tokens: Counts, lower: Any) -> Any:
        """Probability of ``tokens`` after ``contexts``, backed by the ``lower`` order's."""
        count = _look_up(self._keys, self._counts, self._key(contexts, tokens))
        total = _look_up(self._contexts, self._totals, contexts)
        kinds = _look_up(self._contexts, self._kinds, contexts)
        seen = total + kinds
        return np.where(seen > 0, (count + kinds * lower) / np.maximum(seen, 1), lower)

    def _key(self, contexts: Counts, tokens: Counts) -> Counts:
        return contexts.astype(np.int64) * self._vocabulary + tokens


def _look_up(keys: Counts, values: Counts, wanted: Counts) -> Counts:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
