"""Names of parameters that an optimizer only numbers, from the bits of their master weights.

Groups hold parameters in the order of the model. Where shapes leave several ways to deal the model
out to groups, what computes tells: it is the rounded master, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from core_ucp.files.pickles import Located
from core_ucp.sources.deepspeed.agreement import agree
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom


@dataclass
class Queue:
    """Master weights of a group that have no name yet.

    Attributes:
        tensors: one per parameter, or one flat tensor of all.
        flat: whether there is one flat tensor.
        named: atoms by name, in the order of the group.
    """

    tensors: Sequence[Located]
    flat: bool
    named: dict[str, Atom]
    _taken: int = 0

    def next(self, shape: tuple[int, ...]) -> Atom | None:
        """The next master, if it can be one of this shape."""
        numel = int(torch.Size(shape).numel())
        if self.flat:
            if self._taken + numel > self.tensors[0].numel:
                return None
            return part_of(self.tensors[0], self._taken, shape)
        if self._taken == len(self.tensors) or self.tensors[self._taken].shape != shape:
            return None
        return self.tensors[self._taken].atom()

    def take(self, name: str, atom: Atom) -> None:
        """Give the next master a name."""
        self.named[name] = atom
        self._taken += atom.numel if self.flat else 1

    @property
    def done(self) -> bool:
        """Whether all of it has names."""
        return self._taken == (self.tensors[0].numel if self.flat else len(self.tensors))


def part_of(flat: Located, first: int, shape: tuple[int, ...]) -> Atom:
    """A parameter in a flat tensor."""
    size = flat.dtype.itemsize
    return Atom(shape, flat.dtype, Pieces.dense(shape, flat.file, flat.offset + first * size, size))


def name_by_bits(files: Files, queues: Sequence[Queue], halves: Mapping[str, Atom]) -> bool:
    """Give names to all masters.

    Args:
        files: that the tensors are in.
        queues: of the groups; gain the names.
        halves: what computes, by name, in the order of the model; some may be of no group.

    Returns:
        whether there is just one way.
    """
    for name, half in halves.items():
        fits: list[tuple[Queue, Atom]] = []
        for queue in queues:
            master = queue.next(half.shape) if half.numel else None
            if master is not None and agree(files, master, half):
                fits.append((queue, master))
        if len(fits) > 1:
            return False
        for queue, master in fits:
            queue.take(name, master)
    return all(queue.done for queue in queues)
