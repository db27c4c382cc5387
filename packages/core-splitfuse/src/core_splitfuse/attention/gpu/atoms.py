"""Atoms of a pass: which program computes what, decided on the host from lengths it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core_splitfuse.attention.gpu.kernel import FIELDS, MERGE_FIELDS

Numbers = NDArray[np.int32]

_PROGRAMS_PER_PROCESSOR: Final = 2
_LEAST_KEYS: Final = 256
"""Keys of a split at least: below, merging costs more than it wins."""


@dataclass(frozen=True)
class Cut:
    """How a launch cuts sequences.

    Args:
        tokens: of an atom at most.
        programs: that an atom takes, one for each key head or more.
        short: whether it is the launch of short sequences; the other one is that of chunks.
    """

    tokens: int
    programs: int
    short: bool = False


@dataclass(frozen=True)
class Spread:
    """How programs share the keys of an atom.

    Args:
        processors: multiprocessors to keep busy.
        split_tokens: keys of a split of a short sequence, whatever else is in the pass, so that what
            a sequence gets does not depend on its neighbours, bit for bit; chunks are not split
            then. ``None`` keeps all processors busy.
        least_keys: keys of a split at least.
    """

    processors: int
    split_tokens: int | None = None
    least_keys: int = _LEAST_KEYS

    def programs(self, per_atom: int) -> int:
        """Atoms and splits that are worth having, where each takes some programs."""
        return max(1, -(-self.processors * _PROGRAMS_PER_PROCESSOR // per_atom))

    def splits(self, keys: NDArray[np.int64], cut: Cut) -> NDArray[np.int64]:
        """Number of splits of atoms that see so many keys."""
        if self.split_tokens is None:
            share = max(-(-int(keys.sum()) // self.programs(cut.programs)), self.least_keys)
        elif cut.short:
            share = self.split_tokens
        else:
            return np.ones_like(keys)
        found: NDArray[np.int64] = -(-keys // share)
        return found

    def most(self, atoms: int, keys: int, cut: Cut) -> int:
        """Atoms with their splits that there can be."""
        if self.split_tokens is None:
            return atoms + self.programs(cut.programs)
        return atoms * -(-keys // self.split_tokens) if cut.short else atoms

    def merged(self, tokens: int, cut: Cut) -> int:
        """Tokens of a row of ``tokens`` whose parts there can be to merge."""
        if self.split_tokens is None:
            return min(tokens, self.programs(cut.programs) * cut.tokens)
        return tokens if cut.short else 0


@dataclass(frozen=True)
class Kind:
    """What atoms depend on beside the pass.

    Args:
        decodes: how sequences are cut that are no longer than one atom of it.
        chunks: how all others are cut.
        window: tokens that a token sees, or ``None``.
    """

    decodes: Cut
    chunks: Cut
    window: int | None = None


@dataclass(frozen=True)
class Row:
    """Sequences of a pass.

    Args:
        starts: (S,) row of the first token of each.
        begins: (S,) position of it; negative for padding, whose length is zero.
        counts: (S,) tokens of each.
    """

    starts: Numbers
    begins: Numbers
    counts: Numbers

    def only(self, chosen: NDArray[np.bool_]) -> Row:
        """Those that are chosen."""
        return Row(self.starts[chosen], self.begins[chosen], self.counts[chosen])


@dataclass(frozen=True)
class Listed:
    """Atoms of one launch.

    Args:
        atoms: (A, 8) as kernels read them, the longest first.
        merges: (M, 4) tokens whose parts are to be merged.
        parts: places that parts take.
    """

    atoms: Numbers
    merges: Numbers
    parts: int


def listed(sequences: Numbers, row: Row, cut: Cut, window: int | None, spread: Spread) -> Listed:
    """Cut sequences into atoms, and atoms into splits.

    Args:
        sequences: (S,) index of each in the tables of the pass.
        row: these sequences.
        cut: how.
        window: tokens that a token sees.
        spread: how keys are shared.
    """
    pieces = -(-row.counts // cut.tokens)
    owner = np.repeat(np.arange(len(sequences)), pieces)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    done = index * cut.tokens
    count = np.minimum(row.counts[owner] - done, cut.tokens)
    position = row.begins[owner] + done
    length = position + count
    keys = length if window is None else np.minimum(length, count + window - 1)
    splits = spread.splits(np.maximum(keys, 1).astype(np.int64), cut)
    total = int(splits.sum())
    atom = np.repeat(np.arange(len(owner)), splits)
    split = np.arange(total) - np.repeat(np.cumsum(splits) - splits, splits)
    shared = splits > 1
    rows = np.where(shared, splits * count, 0)
    places = np.cumsum(rows) - rows
    atoms = np.zeros((total, FIELDS), np.int32)
    atoms[:, 0] = sequences[owner[atom]]
    atoms[:, 1] = (row.starts[owner] + done)[atom]
    atoms[:, 2] = count[atom]
    atoms[:, 3] = position[atom]
    atoms[:, 4] = split
    atoms[:, 5] = splits[atom]
    atoms[:, 6] = (places[atom] + split * count[atom]) * shared[atom]
    # The longest first, so that no program starts late and ends alone.
    order = np.argsort(-(keys / splits)[atom], kind="stable")
    merges = _merges(row.starts[owner] + done, count, splits, places)
    return Listed(atoms[order], merges, int(rows.sum()))


def _merges(rows: Any, counts: Any, splits: Any, places: Any) -> Numbers:
    shared = splits > 1
    rows, counts, splits, places = (x[shared] for x in (rows, counts, splits, places))
    owner = np.repeat(np.arange(len(rows)), counts)
    token = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    merges = np.zeros((len(owner), MERGE_FIELDS), np.int32)
    merges[:, 0] = rows[owner] + token
    merges[:, 1] = places[owner] + token
    merges[:, 2] = counts[owner]
    merges[:, 3] = splits[owner]
    return merges
